"""`transformers.Trainer` with a LoHaModel in the place of a model: no PEFT in between."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from safetensors.torch import load_file

from loha_core import LoHaConfig, LoHaError, LoHaModel, get_peft_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(seed: int = 0):
    """Its embeddings and its head share a weight."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Sentences(torch.utils.data.Dataset):
    """With a column that no model knows."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index):
        ids = torch.randint(0, 32, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "source": f"sentence {index}"}


def trainer(folder, model=None, **settings):
    if model is None:
        base = llama()
        torch.manual_seed(1)
        model = LoHaModel(base, LoHaConfig(r=2, target_modules="all-linear", module_dropout=0.1))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=3, max_steps=6, save_steps=3, logging_steps=1,
        learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True, seed=5, **settings,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def losses(run) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(folder)
    run.train()
    return folder, run


def test_it_trains_on_the_columns_of_the_base(trained):
    _, run = trained
    assert list(inspect.signature(run.model.forward).parameters) == list(
        inspect.signature(run.model.model.forward).parameters
    )
    assert run.label_names == ["labels"]
    found = losses(run)
    assert list(found) == [1, 2, 3, 4, 5, 6] and found[6] < found[1]
    assert "eval_loss" in run.evaluate()


def test_a_checkpoint_holds_the_adapter_alone(trained):
    folder, run = trained
    state = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert state and all(".hada_" in key for key in state)
    assert all(torch.equal(tensor, run.model.state_dict()[key]) for key, tensor in state.items())
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == set(state)


def test_it_resumes_bit_for_bit(trained, tmp_path):
    folder, whole = trained
    resumed = trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing keys.*")
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert {step: loss for step, loss in losses(resumed).items() if step > 3} == {
        step: loss for step, loss in losses(whole).items() if step > 3
    }
    theirs = whole.model.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in resumed.model.state_dict().items())


def test_it_goes_back_to_the_best_checkpoint(tmp_path):
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, lr_scheduler_type="constant"
    )
    run.train()
    best = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert best and all(torch.equal(tensor, run.model.state_dict()[key]) for key, tensor in best.items())


def test_tied_weights_are_still_tied_and_as_they_were(trained, tmp_path):
    _, run = trained
    base = run.model.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert torch.equal(base.get_input_embeddings().weight, llama().get_input_embeddings().weight)
    run.model.save_pretrained(tmp_path)
    again = LoHaModel.from_pretrained(llama(), tmp_path)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(again(ids).logits, run.model.eval()(ids).logits)


def test_the_losses_are_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    found = []
    for make, config in ((get_peft_model, LoHaConfig), (peft.get_peft_model, peft.LoHaConfig)):
        base = llama()
        torch.manual_seed(1)
        run = trainer(tmp_path, make(base, config(r=2, target_modules=["q_proj", "v_proj"])), eval_strategy="steps")
        run.train()
        found.append([entry.get("loss", entry.get("eval_loss")) for entry in run.state.log_history[:-1]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_the_base_has_is_reached():
    base = llama()
    model = LoHaModel(base, LoHaConfig(r=2))
    assert model.config is base.config and model.generation_config is base.generation_config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    ids = torch.arange(3)[None]
    assert torch.equal(model.generate(ids, do_sample=False), llama().generate(ids, do_sample=False))


@pytest.mark.parametrize("before", [True, False])
def test_reentrant_checkpoints_reach_the_adapters(before):
    """Frozen embeddings give no gradients on; where checkpoints are on already, the model asks for them itself."""
    base = llama().train()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    if before:
        enable({"use_reentrant": True})
    model = LoHaModel(base, LoHaConfig(r=2, init_weights=False)).train()
    if not before:
        enable({"use_reentrant": True})
        model.prepare_model_for_gradient_checkpointing()
    ids = torch.arange(6)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_classes_tell_trainers_of_labels_and_calls_pass_them_on():
    assert "labels" in inspect.signature(LoHaModel.forward).parameters
    model = LoHaModel(llama(), LoHaConfig(r=2))
    ids = torch.arange(6)[None]
    assert torch.equal(LoHaModel.forward(model, ids, labels=ids).loss, model.forward(ids, labels=ids).loss)
    linear = LoHaModel(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoHaConfig(r=2, target_modules=["0"]))
    x = torch.ones(1, 3)
    assert torch.equal(LoHaModel.forward(linear, x), linear(x))


def test_accelerate_saves_what_it_gathered(tmp_path):
    """`unwrap_model(model).save_pretrained(folder, is_main_process=, save_function=, state_dict=)`."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = LoHaModel(llama(), LoHaConfig(r=2, init_weights=False, use_scalar=True))
    ids = torch.arange(5)[None]
    wanted = model(ids).logits
    gathered = {key: tensor.clone() for key, tensor in accelerator.get_state_dict(model).items()}
    with torch.no_grad():  # as where the parameters here are but this process's share
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    options = {"save_function": accelerator.save, "state_dict": gathered}
    model.save_pretrained(tmp_path / "not here", is_main_process=False, **options)
    assert not (tmp_path / "not here").exists()
    model.save_pretrained(tmp_path, is_main_process=True, **options)
    torch.testing.assert_close(LoHaModel.from_pretrained(llama(), tmp_path)(ids).logits, wanted)


def test_its_state_is_the_adapters_and_what_else_trains():
    model = LoHaModel(llama(), LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.model.model.norm.weight.requires_grad_(True)
    kinds = {".hada_" in key or key.split("model.", 1)[1] for key in model.state_dict()}
    assert kinds == {True, "lm_head.modules_to_save.default.weight", "model.norm.weight"}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in model.state_dict().items())
    whole = torch.nn.Module.state_dict(model)
    twin.load_state_dict(whole)
    assert all(torch.equal(tensor, torch.nn.Module.state_dict(twin)[key]) for key, tensor in whole.items())
    state = model.state_dict()
    with pytest.raises(LoHaError, match=r"misses \['model.model.layers.0.self_attn.q_proj.hada_w1_a.default'\]"):
        twin.load_state_dict({key: state[key] for key in list(state)[1:]})
    with pytest.raises(LoHaError, match=r"has \['model.nothing'\] in excess"):
        twin.load_state_dict(state | {"model.nothing": torch.zeros(1)})


def test_within_another_module_the_state_is_whole():
    """FSDP and DistributedDataParallel expect all parameters in theirs."""
    outer = torch.nn.ModuleDict({"inner": LoHaModel(llama(), LoHaConfig(r=2))})
    assert set(outer.state_dict()) >= {name for name, _ in outer.named_parameters()}
    outer.load_state_dict(outer.state_dict())
