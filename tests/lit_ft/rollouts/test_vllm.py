"""Rollouts by vLLM: what it is asked, how a policy replaces another, what happens when it dies; and the real one."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_ft.errors import UserError
from lit_ft.rollouts import Rollout, RolloutError, Sampling
from lit_ft.rollouts.base import seed_of
from lit_ft.rollouts.vllm import VllmRollouts, start_engine
from tests.lit_ft.stub_vllm import STOP, Behaviour, Died, StubEngine, Stubs, echo

PROMPTS = [(11, 12, 13), (14,), (15, 16), (14,), (17, 18)]


def write(path: Path) -> None:
    (path / "weights").write_text("the policy")


def rollouts(stubs: Stubs, tmp_path: Path, **changes: Any) -> VllmRollouts:
    settings: dict[str, Any] = {"folder": tmp_path / "rollouts", "max_lora_rank": 8, "max_model_len": 64}
    sampling = changes.pop("sampling", Sampling(0.7, 5, (STOP, 8)))
    return VllmRollouts("a-model", changes.pop("write", write), sampling, start=stubs.start, **{**settings, **changes})


def test_it_is_asked_for_the_log_probabilities_that_it_draws_with(stubs: Stubs, tmp_path: Path) -> None:
    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> tuple[int, Any] | None:
        if path != "/v1/completions":
            return None
        assert body["logprobs"] == 0
        known = {"token_logprobs": [-1.5, -0.5, -0.25]}
        return 200, {"choices": [{**choice, "logprobs": known} for choice in echo(body)["choices"]]}

    stubs.behave = behave
    with rollouts(stubs, tmp_path) as subject:
        ((one,),) = subject.generate([(1, 2)], 1, 0)
    assert one.logps == (-1.5, -0.5, -0.25) and one.completion == (1, 0, STOP)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retries": -1}, "rollout.retries=-1"),
        ({"start_timeout": 0}, "rollout.start_timeout=0"),
        ({"request_timeout": float("nan")}, "rollout.request_timeout=nan"),
    ],
    ids=str,
)
def test_settings_of_it_that_mean_nothing_are_refused(
    stubs: Stubs, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        rollouts(stubs, tmp_path, **changes)
    assert not stubs.engines, "before anything is started"


def expected(n: int) -> list[list[Rollout]]:
    return [[Rollout(prompt, (prompt[0], k, STOP), True) for k in range(n)] for prompt in PROMPTS]


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_asked_for_plain_samples_of_the_policy(stubs: Stubs, tmp_path: Path) -> None:
    """Every field is given: what is left out, vLLM takes from the base's own generation settings."""
    with rollouts(stubs, tmp_path) as subject:
        assert subject.generate([PROMPTS[0]], 2, seed=4) == [expected(2)[0]]
    (body,) = stubs.of("completions")
    assert body == {
        "model": "base",
        "prompt": [11, 12, 13],
        "n": 2,
        "seed": seed_of(4, 0),
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": 5,
        "stop_token_ids": [STOP, 8],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "logprobs": 0,
    }


@pytest.mark.slow  # imports vLLM
def test_the_installed_vllm_knows_every_field() -> None:
    """It ignores those it does not know."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    subject = object.__new__(VllmRollouts)
    subject._sampling, subject._policy = Sampling(0.7, 5, (STOP,)), None
    body = subject._request((1, 2), 3, 4)
    assert set(body) <= set(protocol.CompletionRequest.model_fields)
    request = protocol.CompletionRequest(**body)
    made = request.to_sampling_params(5, {"top_k": 7, "repetition_penalty": 3.0, "temperature": 0.1, "top_p": 0.3})
    assert (made.temperature, made.top_k, made.top_p, made.min_p) == (0.7, 0, 1.0, 0.0)
    assert (made.repetition_penalty, made.presence_penalty, made.frequency_penalty) == (1.0, 0.0, 0.0)
    made.update_from_generation_config({"eos_token_id": [77, 78]}, eos_token_id=76)
    assert made.stop_token_ids == [STOP] and made.eos_token_id is None
    assert made.n == 3 and made.seed == body["seed"]


def test_draws_depend_on_the_place_of_a_prompt(stubs: Stubs, tmp_path: Path) -> None:
    with rollouts(stubs, tmp_path) as subject:
        subject.generate(PROMPTS[1::2], 2, 4, places=[1, 3])
    assert {body["seed"] for body in stubs.of("completions")} == {seed_of(4, 1), seed_of(4, 3)}


def test_no_two_completions_share_their_draws() -> None:
    """vLLM gives the k-th completion of a prompt seed + k."""
    seeds = [seed_of(seed, index) + k for seed in range(20) for index in range(100) for k in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and max(seeds) < 2**63
    assert seed_of(1, 2) == seed_of(1, 2)


def test_answers_come_in_the_order_of_the_prompts(stubs: Stubs, tmp_path: Path) -> None:
    """They are asked side by side, and the first one takes longest."""
    under_way, most = 0, 0

    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> None:
        nonlocal under_way, most
        with stubs.lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.3 if body["prompt"] == [11, 12, 13] else 0.05)
        with stubs.lock:
            under_way -= 1

    stubs.behave = behave
    done: list[int] = []
    with rollouts(stubs, tmp_path, side_by_side=3) as subject:
        assert subject.generate(PROMPTS, 2, 0, done.append) == expected(2)
        assert subject.generate([], 2, 0) == []
    assert most == 3 and done == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("tokens", "why", "stopped", "completion", "ended"),
    [
        ([5, 6, 8], "stop", 8, (5, 6, 8), True),
        ([5, 6], "stop", 8, (5, 6, 8), True),  # a version that leaves the stop token out
        ([], "stop", 8, (8,), True),
        ([5, 6, 4, 3, 2], "length", None, (5, 6, 4, 3, 2), False),
        ([5, 6, 4, 3, 9], "length", None, (5, 6, 4, 3, 9), True),
    ],
)
def test_a_completion_holds_the_token_that_ended_it(
    stubs: Stubs, tmp_path: Path, tokens: Any, why: str, stopped: Any, completion: tuple[int, ...], ended: bool
) -> None:
    choice = {"index": 0, "token_ids": tokens, "finish_reason": why, "stop_reason": stopped}
    stubs.behave = lambda *_: (200, {"choices": [choice]})
    with rollouts(stubs, tmp_path) as subject:
        assert subject.generate([(1, 2)], 1, 0) == [[Rollout((1, 2), completion, ended)]]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"token_ids": [5], "finish_reason": "stop", "stop_reason": None}, r"after 1 of 5 tokens without"),
        ({"token_ids": [5], "finish_reason": "length", "stop_reason": None}, r"generation_config\.json"),
        ({"token_ids": [], "finish_reason": "stop", "stop_reason": 77}, r"after 0 of 5"),
        ({"finish_reason": "length", "stop_reason": None}, "does not return token ids"),
    ],
)
def test_what_is_no_sample_of_ours_is_not_taken_for_one(
    stubs: Stubs, tmp_path: Path, choice: dict[str, Any], words: str
) -> None:
    stubs.behave = lambda *_: (200, {"choices": [{"index": 0, **choice}]})
    with rollouts(stubs, tmp_path) as subject, pytest.raises(RolloutError, match=words):
        subject.generate([(1, 2)], 1, 0)
    assert len(stubs.engines) == 1 and stubs.nothing_runs()


# --- policies --------------------------------------------------------------------------------------------------------


def test_each_policy_has_a_name_and_a_folder_of_its_own(stubs: Stubs, tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    (folder / "policy-000001").mkdir(parents=True)
    (folder / "policy-000001" / "of a run that was killed").touch()
    seen: list[list[str]] = []

    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> None:
        seen.append(sorted(engine.loaded))

    stubs.behave = behave
    with rollouts(stubs, tmp_path) as subject:
        subject.generate(PROMPTS[:1], 1, 0)
        for version in (1, 2, 3):
            subject.update()
            assert [path.name for path in folder.iterdir()] == [f"policy-00000{version}"]
            assert [path.name for path in (folder / f"policy-00000{version}").iterdir()] == ["weights"]
            assert list(stubs.engines[0].loaded) == [f"policy-00000{version}"]
            subject.generate(PROMPTS[:1], 1, 0)
    paths = [path.removeprefix("/v1/").removesuffix("_lora_adapter") for path, _ in stubs.asked]
    assert paths == ["completions", "load", "completions", *["load", "unload", "completions"] * 2]
    assert [body["model"] for body in stubs.of("completions")] == ["base"] + [f"policy-00000{k}" for k in (1, 2, 3)]
    assert [body["lora_name"] for body in stubs.of("unload_lora_adapter")] == ["policy-000001", "policy-000002"]
    assert seen[4] == ["policy-000001", "policy-000002"]  # the old one goes when the new one is there
    assert all(Path(body["lora_path"]).is_absolute() for body in stubs.of("load_lora_adapter"))
    assert len(stubs.engines) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("status", [400, 500])
def test_an_adapter_that_vllm_does_not_take_stops_at_once(stubs: Stubs, tmp_path: Path, status: int) -> None:
    """vLLM answers 500 for a rank that is too high, and lives on."""

    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> tuple[int, Any] | None:
        return (status, {"error": {"message": "LoRA rank 64 is greater than 8."}}) if "load" in path else None

    stubs.behave = behave
    subject = rollouts(stubs, tmp_path)
    with pytest.raises(RolloutError, match=r"loading policy-000001: .*LoRA rank 64 is greater than 8.*vllm\.log"):
        subject.update()
    assert len(stubs.asked) == 1 and len(stubs.engines) == 1 and stubs.nothing_runs()
    subject.close()
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(stubs: Stubs, tmp_path: Path) -> None:
    full = False

    def writes(path: Path) -> None:
        write(path)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    with rollouts(stubs, tmp_path, write=writes) as subject:
        subject.update()
        full = True
        with pytest.raises(UserError, match=r"policy-000002: No space left on device.*make room"):
            subject.update()
        assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["policy-000001"]
        assert subject.generate(PROMPTS, 1, 0) == expected(1)
        full = False
        subject.update()
        subject.generate(PROMPTS[:1], 1, 0)
    assert {body["model"] for body in stubs.of("completions")} == {"policy-000001", "policy-000002"}


# --- an engine that dies ---------------------------------------------------------------------------------------------


def dies_at(*counts: int) -> Behaviour:
    """The engine dies when the so-manieth request of all arrives."""

    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> None:
        if count in counts:
            raise Died

    return behave


def test_a_dead_engine_is_started_again_and_asked_for_what_is_missing(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.behave = dies_at(4)  # the load, two answers, and then
    done: list[int] = []
    with rollouts(stubs, tmp_path, side_by_side=1) as subject:
        subject.update()
        assert subject.generate(PROMPTS, 2, 6, done.append) == expected(2)
        assert len(stubs.engines) == 2 and not stubs.engines[0].alive() and stubs.engines[1].alive()
        assert list(stubs.engines[1].loaded) == ["policy-000001"]
        subject.update()  # what the dead one had need not be unloaded
        assert list(stubs.engines[1].loaded) == ["policy-000002"]
    assert done == [2, 4, 6, 8, 10]
    assert Counter(stubs.answered) == Counter(seed_of(6, index) for index in range(5))  # each once, seeds unchanged
    assert {body["model"] for body in stubs.of("completions")} == {"policy-000001"}
    assert stubs.settings[0] == stubs.settings[1]
    told = capsys.readouterr().err
    assert told.count("Starting it again") == 1 and "1 of 2" in told and "connection" in told
    assert stubs.nothing_runs()


@pytest.mark.parametrize("at", [1, 3, 4])
def test_it_may_die_while_a_policy_is_loaded_or_unloaded(stubs: Stubs, tmp_path: Path, at: int) -> None:
    """1: the first load; 3: the second, after an answer; 4: the first one's unload."""
    stubs.behave = dies_at(at)
    with rollouts(stubs, tmp_path) as subject:
        subject.update()
        if at > 1:
            subject.generate(PROMPTS[:1], 1, 0)
            subject.update()
        assert len(stubs.engines) == 2
        assert list(stubs.engines[1].loaded) == [f"policy-00000{2 if at > 1 else 1}"]
        assert subject.generate(PROMPTS, 1, 0) == expected(1)
        assert len(list((tmp_path / "rollouts").iterdir())) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_one_that_dies_again_and_again_stops_the_run(stubs: Stubs, tmp_path: Path, retries: int) -> None:
    stubs.behave = dies_at(*range(2, 100))
    subject = rollouts(stubs, tmp_path, retries=retries)
    subject.update()
    with pytest.raises(RolloutError) as stopped:
        subject.generate(PROMPTS, 1, 0)
    text = str(stopped.value)
    assert f"failed {retries + 1} times while generating rollouts" in text
    assert "vllm.log" in text and "gpu_memory_utilization" in text and "rollout=transformers" in text
    assert "the last line of the log" in text or retries
    assert len(stubs.engines) == retries + 1 and stubs.nothing_runs()
    subject.close()


def test_deaths_are_counted_anew_in_each_round(stubs: Stubs, tmp_path: Path) -> None:
    stubs.behave = dies_at(1, 2, 4, 5)
    with rollouts(stubs, tmp_path) as subject:
        assert subject.generate(PROMPTS[:1], 1, 0) == expected(1)[:1]
        assert subject.generate(PROMPTS[:1], 1, 0) == expected(1)[:1]
    assert len(stubs.engines) == 5


def test_one_that_does_not_start_again_stops_the_run(stubs: Stubs, tmp_path: Path) -> None:
    stubs.behave, stubs.refuse_start_from = dies_at(1), 1
    subject = rollouts(stubs, tmp_path)
    with pytest.raises(RolloutError, match=r"failed 3 times.*vLLM ended while starting"):
        subject.generate(PROMPTS, 1, 0)
    assert len(stubs.settings) == 3 and stubs.nothing_runs()


def test_the_first_start_is_not_tried_again(stubs: Stubs, tmp_path: Path) -> None:
    stubs.refuse_start_from = 0
    with pytest.raises(UserError, match="vLLM ended while starting"):
        rollouts(stubs, tmp_path)
    assert len(stubs.settings) == 1


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": {"message": "EngineDeadError"}}),
        (200, "no JSON"),
        (200, {"choices": []}),
        (200, {"choices": [{"index": 0, "token_ids": [1], "finish_reason": "abort", "stop_reason": None}]}),
    ],
)
def test_a_failure_inside_is_a_death(stubs: Stubs, tmp_path: Path, failure: tuple[int, Any]) -> None:
    stubs.behave = lambda engine, path, body, count: failure if count == 2 else None
    with rollouts(stubs, tmp_path, side_by_side=1) as subject:
        assert subject.generate(PROMPTS, 1, 0) == expected(1)
    assert len(stubs.engines) == 2 and not stubs.engines[0].alive()
    assert len(stubs.answered) == len(PROMPTS)


def test_one_that_hangs_is_a_dead_one(stubs: Stubs, tmp_path: Path) -> None:
    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> None:
        if engine is stubs.engines[0] and body["prompt"] == [14]:
            engine.broken.wait(10)

    stubs.behave = behave
    with rollouts(stubs, tmp_path, request_timeout=0.5) as subject:
        assert subject.generate(PROMPTS, 1, 0) == expected(1)
    assert len(stubs.engines) == 2
    again = [body["prompt"] for body in stubs.of("completions")[len(PROMPTS) :]]
    assert again == [[14], [14]]  # the others had been answered


def test_what_vllm_refuses_is_not_asked_again(stubs: Stubs, tmp_path: Path) -> None:
    stubs.behave = lambda *_: (400, {"error": {"message": "this model's maximum context length is 16"}})
    subject = rollouts(stubs, tmp_path, side_by_side=1)
    with pytest.raises(RolloutError, match="maximum context length is 16"):
        subject.generate(PROMPTS, 1, 0)
    assert len(stubs.asked) == 1 and len(stubs.engines) == 1 and stubs.nothing_runs()


# --- nothing stays behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the caller's")])
def test_an_interruption_ends_the_engine_at_once(stubs: Stubs, tmp_path: Path, error: BaseException) -> None:
    """Also while answers are under way that would take long."""

    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> None:
        if body["prompt"] != [11, 12, 13]:
            engine.broken.wait(60)

    def stop(done: int) -> None:
        raise error

    stubs.behave = behave
    subject = rollouts(stubs, tmp_path)
    began = time.monotonic()
    with pytest.raises(type(error)):
        subject.generate(PROMPTS, 1, 0, stop)
    assert time.monotonic() - began < 10 and stubs.nothing_runs()
    assert len(stubs.engines) == 1


def test_closing_deletes_the_policy_and_keeps_the_log(stubs: Stubs, tmp_path: Path) -> None:
    subject = rollouts(stubs, tmp_path)
    subject.update()
    (tmp_path / "rollouts" / "vllm.log").touch()
    subject.close()
    subject.close()
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["vllm.log"] and stubs.nothing_runs()


def test_a_failure_in_the_block_closes_it(stubs: Stubs, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), rollouts(stubs, tmp_path):
        assert stubs.engines[0].alive()
        raise ZeroDivisionError
    assert stubs.nothing_runs()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_prompt_without_room_is_refused_before_anything_is_asked(stubs: Stubs, tmp_path: Path) -> None:
    with rollouts(stubs, tmp_path) as subject:
        subject.generate([(5,) * 59], 1, 0)
        with pytest.raises(UserError, match=r"60 tokens.*65.*64.*algorithm\.max_new_tokens.*data\.max_length"):
            subject.generate([PROMPTS[0], (5,) * 60], 1, 0)
        with pytest.raises(UserError, match="no tokens"):
            subject.generate([()], 1, 0)
        assert stubs.engines[0].alive() and len(stubs.asked) == 1


def test_a_temperature_that_vllm_would_change_is_refused(stubs: Stubs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.01.*algorithm\.temperature is 0\.001.*rollout=transformers"):
        rollouts(stubs, tmp_path, sampling=Sampling(0.001))
    assert stubs.engines == []


def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "max_lora_rank": 12, "max_model_len": 64, "dtype": "float32", "log_path": tmp_path / "vllm.log",
        "start_timeout": 9.0, "gpu_memory_utilization": 0.4,
    }  # fmt: skip


def test_without_vllm_it_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lit_ft\[vllm\]"):
        VllmRollouts("model", write, Sampling(), folder=tmp_path / "rollouts", max_lora_rank=8, max_model_len=64)


DRAWN = ("--logprobs-mode", "processed_logprobs")
NOBIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.mark.parametrize(
    ("cpu", "threads", "more"),
    [
        (True, None, {"arguments": DRAWN}),
        (True, 3, {"arguments": DRAWN, "environment": {**NOBIND, "OMP_NUM_THREADS": "3"}}),
        (False, None, {"arguments": (*DRAWN, "--gpu-memory-utilization", "0.4")}),
    ],
)
def test_the_engine_of_serve_is_what_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool, threads: int | None, more: dict[str, Any]
) -> None:
    from serve import engine as module

    signature = inspect.signature(module.Engine)
    made: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(dict(signature.bind(*args, **kwargs).arguments))

        def start(self, on_progress: Callable[[str, float], None]) -> None:
            on_progress("loading the weights", 1.0)

    monkeypatch.setattr(module, "Engine", Recorder)
    monkeypatch.setattr(module, "on_cpu", lambda: cpu)
    assert isinstance(start_engine("folder", threads=threads, **settings(tmp_path)), Recorder)
    (found,) = made
    assert (found["model"], found["served_name"], found["max_lora_rank"]) == ("folder", "base", 12)
    assert found["max_loras"] == 1 and found["max_cpu_loras"] == 2
    assert {name: found[name] for name in ("arguments", "environment") if name in found} == more


# --- the real vLLM ---------------------------------------------------------------------------------------------------

TOKENS = 8
DRAWS = 300


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_policy_of_the_trainer_is_what_vllm_draws_from(tmp_path: Path) -> None:
    """Base, then a policy, then another one: by their best tokens, and by how often first tokens come."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    import torch

    from lit_ft.models.adapt import save_trained
    from lit_ft.models.kinds import KINDS
    from lit_ft.models.load import load_model, load_tokenizer
    from lit_ft.models.resolve import resolve_model
    from tests.serve.test_engine import gone

    torch.manual_seed(0)  # of A
    model = KINDS["lora"](r=8).begin(load_model("bundled", dtype=torch.float32))
    tokenizer = load_tokenizer("bundled")
    prompts = [
        tuple(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in ("What is the capital of France?", "Count to five.", "Name a colour.")
    ]
    stops = (int(tokenizer.eos_token_id),)
    cold = Sampling(0.01, TOKENS, stops)

    def stir(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)

    def behind(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        """By how much a token's logit is behind the best one's, at most, as transformers and PEFT compute them."""
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return float((logits.max(-1).values - logits[range(len(completion)), list(completion)]).max())

    common: dict[str, Any] = {"max_lora_rank": 8, "max_model_len": 256, "dtype": "float32"}
    with VllmRollouts(
        resolve_model("bundled"),
        lambda path: save_trained(model, path),
        cold,
        folder=tmp_path / "rollouts",
        **common,
    ) as subject:
        server: Any = subject._server
        group = server._process.pid
        said: list[list[tuple[int, ...]]] = []
        for version in range(3):
            if version:
                stir(version)
                subject.update()
            found = subject.generate(prompts, 1, version)
            said.append([rollout.completion for (rollout,) in found])
            # At a temperature of 0.01 a token that is 0.1 behind comes once in 22,000 times.
            assert max(behind(*pair) for pair in zip(prompts, said[-1], strict=True)) < 0.1
            assert all(rollout.ended is (rollout.completion[-1] in stops) for (rollout,) in found)
            if version:  # and what the policy before said is none of this one's
                assert max(behind(*pair) for pair in zip(prompts, said[-2], strict=True)) > 0.5

        # What it says of its draws is what the trainer computes at that temperature.
        subject._sampling = Sampling(0.7, TOKENS, stops)
        for prompt, (rollout,) in zip(prompts, subject.generate(prompts, 1, 5), strict=True):
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([[*prompt, *rollout.completion]])).logits[0]
            rows = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            ours = rows[range(len(rollout.completion)), list(rollout.completion)].tolist()
            assert rollout.logps == pytest.approx(ours, abs=0.02)

        # More tokens of prompts at once than vLLM reads in one step.
        short = prompts[1][:8]
        subject._sampling = Sampling(0.7, 1, stops)
        drawn = Counter(r.completion[0] for row in subject.generate([short] * 4, DRAWS // 4, 3) for r in row)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([short])).logits[0, -1].double()
        chances = (logits / 0.7).softmax(-1)
        for token, chance in zip(*[values.tolist() for values in chances.topk(20)[::-1]], strict=True):
            assert abs(drawn[token] / DRAWS - chance) < 5 * (chance * (1 - chance) / DRAWS) ** 0.5 + 3 / DRAWS
    assert gone(group)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["vllm.log"]
