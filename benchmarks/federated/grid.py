"""Flower's Grid in one process: the messages are Flower's, and a client answers when it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # before 1.33 a message did not ask who sends it
    TaskIdentity = None


class InProcess(Grid):
    """Node i, from 1, is the client with partition-id i − 1; what it keeps in its Context lasts as long as this object.

    Args:
        app: the clients' side.
        clients: how many there are.
        config: the run's configuration, as [tool.flwr.app.config] has it.
    """

    def __init__(self, app: ClientApp, clients: int, config: Mapping[str, Any]) -> None:
        if TaskIdentity is not None:
            TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.app = app
        self.contexts = {
            node: Context(1, node, {"partition-id": node - 1, "num-partitions": clients}, RecordDict(), dict(config))
            for node in range(1, clients + 1)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **settings: Any) -> Message:
        raise NotImplementedError("Message() is what a strategy calls")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            keys.append(str(len(self._replies)))
            try:
                reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            except Exception as error:  # as a SuperNode does: the server hears of it
                reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
            self._replies[keys[-1]] = reply
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies[key] for key in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = self.pull_messages(self.push_messages(messages))
        self._replies.clear()
        return replies
