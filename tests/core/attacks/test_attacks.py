"""Each hostile file against each reader: a LoHaError that names the file, and nothing else, within seconds."""

from __future__ import annotations

import builtins
import io
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from loha_core import LoHaConfig, LoHaError, LoHaModel, load_adapter, save_adapter
from loha_core.adapter import split_layers
from loha_core.cli import main

from .. import samples
from .files import ATTACKS, CONFIG, GOOD, WEIGHTS

SECONDS = 5.0  # of this process, on a busy machine


@pytest.mark.parametrize("recipe", ATTACKS, ids=lambda recipe: recipe.__name__)
def test_every_reader_refuses_it_by_name(tmp_path, recipe, capsys):
    for path, message in recipe(tmp_path):
        started = time.process_time()
        try:
            split_layers(load_adapter(path))
        except LoHaError as error:
            assert re.search(message or "", str(error), re.DOTALL), (path, str(error))
            assert str(error).startswith(str(path)), str(error)
        else:
            assert message is None, path
        with pytest.raises(LoHaError) if message else suppress(LoHaError):
            load_adapter(str(path))
        with suppress(LoHaError):  # what is wrong with the values it does not see
            load_adapter(path, values=False)
        with pytest.raises(LoHaError):  # of what can be read, nothing fits this model
            LoHaModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), path)
        status, shown = main(["inspect", str(path)]), capsys.readouterr()
        assert status == bool(shown.err) and (status == 1 or not message), path
        assert not shown.err or (shown.err.startswith("loha: ") and "Traceback" not in shown.err), shown.err
        assert time.process_time() - started < SECONDS, path


@pytest.fixture
def forbid(monkeypatch):
    """Lets the system refuse a path. (To root, who runs tests in containers, no file mode does.)"""
    forbidden: set[str] = set()

    def refusing(function):
        def refuse(path, *args, **kwargs):
            if not isinstance(path, int) and str(path) in forbidden:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return refuse

    for module, name in ((builtins, "open"), (io, "open"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    return lambda path: forbidden.add(str(path))


def test_what_may_not_be_opened(tmp_path, forbid):
    file = samples.write(tmp_path / "a.safetensors", GOOD)
    folder = samples.write_peft(tmp_path / "peft", samples.WRAPPED)
    other = samples.write_peft(tmp_path / "other", samples.WRAPPED)
    (tmp_path / "closed").mkdir()
    for path in (file, folder / CONFIG, other / WEIGHTS, tmp_path / "closed"):
        forbid(path)
    for path in (file, folder, folder / WEIGHTS, other, other / WEIGHTS, tmp_path / "closed"):
        for values in (True, False):
            with pytest.raises(LoHaError, match="Permission denied") as caught:
                load_adapter(path, values=values)
            assert str(path) in str(caught.value)
        with pytest.raises(LoHaError, match="Permission denied"):
            LoHaModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), path)
    with pytest.raises(LoHaError, match=f"{CONFIG}: .*Permission denied"):
        LoHaConfig.from_pretrained(folder)


def test_what_may_not_be_looked_at(tmp_path, monkeypatch):
    file = samples.write(tmp_path / "a.safetensors", GOOD)
    real = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    for read in (load_adapter, LoHaConfig.from_pretrained):
        with pytest.raises(LoHaError, match=re.escape(str(file))):
            read(file)


def test_what_may_not_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    adapter = load_adapter(samples.write(tmp_path / "a.safetensors", GOOD))
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # nor the temporary file taken away
    with pytest.raises(LoHaError, match=r"b\.safetensors: cannot be written .*Permission denied"):
        save_adapter(adapter, tmp_path / "b.safetensors")
    with pytest.raises(LoHaError, match=f"{CONFIG}: cannot be written"):
        LoHaConfig().save_pretrained(tmp_path / "folder")


def test_a_sound_file_is_read_by_all_of_them(tmp_path, capsys):
    path = samples.write(tmp_path / "a.safetensors", samples.module("proj", (6, 4)))
    shapes = load_adapter(path, values=False).layers["proj"]
    assert shapes.shape == (6, 4) and shapes.alpha == 1 and shapes.w1_a.is_meta
    assert load_adapter(path).layers["proj"].w1_a.dtype == shapes.w1_a.dtype == torch.float32
    assert LoHaModel.from_pretrained(nn.ModuleDict({"proj": nn.Linear(4, 6)}), path).targeted_module_names == ["proj"]
    assert main(["inspect", str(path)]) == 0
