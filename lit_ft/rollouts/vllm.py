"""Rollouts by the engine of `serve`: a vLLM beside the trainer, which gets each new policy as an adapter.

The names of requests' fields are those of vLLM 0.32 (`vllm/entrypoints/openai/completion/protocol.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from lit_ft.errors import UserError
from lit_ft.progress import say
from lit_ft.rollouts.base import Rollout, RolloutEngine, RolloutError, Sampling, as_rollout, check_prompts, seed_of

BASE_NAME = "base"

# vLLM raises lower temperatures to this one, without an error.
LOWEST_TEMPERATURE = 0.01


class Server(Protocol):
    """A running engine, as `serve.engine.Engine` is."""

    api_key: str

    @property
    def base_url(self) -> str:
        """Where its API is, with /v1 at the end."""

    def alive(self) -> bool:
        """Whether its process runs."""

    def dead(self) -> bool:
        """Whether the part that computes has ended."""

    def stop(self) -> None:
        """End it and all its children; at any time, and more than once."""

    def tail(self, lines: int = 15) -> list[str]:
        """The last lines of its log."""


def start_engine(
    model_folder: str,
    *,
    max_lora_rank: int,
    max_model_len: int,
    dtype: str,
    log_path: Path,
    start_timeout: float,
    gpu_memory_utilization: float,
    threads: int | None,
) -> Server:
    """Start the engine of `serve` and wait until it answers; the arguments are those of `VllmRollouts`.

    Raises:
        UserError: vLLM is missing, ended, or took too long. Nothing is left running then.
    """
    # The one place where training asks serving for something; `serve` stays optional.
    from serve.engine import Engine, on_cpu

    # What tokens were drawn with, temperature and all, and not the logits' own softmax.
    more: dict[str, Any] = {"arguments": ("--logprobs-mode", "processed_logprobs")}
    if not on_cpu():
        more["arguments"] += ("--gpu-memory-utilization", str(gpu_memory_utilization))
    elif threads is not None:
        more["environment"] = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    engine = Engine(
        model_folder,
        served_name=BASE_NAME,
        max_loras=1,
        max_cpu_loras=2,  # a new policy is loaded before the old one is let go
        max_lora_rank=max_lora_rank,
        max_model_len=max_model_len,
        dtype=dtype,
        log_path=log_path,
        start_timeout=start_timeout,
        **more,
    )
    told = ""

    def tell(stage: str, seconds: float) -> None:
        nonlocal told
        if stage != told:
            told = stage
            say(f"vLLM for rollouts: {stage} ({seconds:.0f} s)")

    engine.start(tell)
    return engine


class VllmRollouts(RolloutEngine):
    """Before the first `update` the base answers; after it, the policy as it was written last.

    Each policy gets a name and a folder of its own: vLLM's cache of prompts is kept by name, so what one policy left
    there never serves the next. What dies is started again, with the policy; prompts that were answered stay answered.
    """

    def __init__(
        self,
        model_folder: str | Path,
        write_adapter: Callable[[Path], None],
        sampling: Sampling,
        *,
        folder: Path,
        max_lora_rank: int,
        max_model_len: int,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.4,
        threads: int | None = None,
        start_timeout: float = 900.0,
        request_timeout: float = 900.0,
        side_by_side: int = 64,
        retries: int = 2,
        start: Callable[..., Server] = start_engine,
    ) -> None:
        """Starts the engine and waits until it answers.

        Args:
            model_folder: the base that the policy adapts.
            write_adapter: writes the policy's adapter, as PEFT has it and vLLM takes it, into a folder that exists.
            sampling: how completions are drawn; stop tokens are these alone, not the base's own.
            folder: for adapters and vLLM's log; made if missing.
            max_lora_rank: the policy's rank.
            max_model_len: tokens of prompt and completion together.
            dtype: "auto" or a type vLLM knows; the trainer's own makes the fewest differences.
            gpu_memory_utilization: share of the card that vLLM takes, weights and cache: trainer and engine share it,
                and vLLM's own 0.9 would leave nothing to train with. No matter on a CPU.
            threads: of vLLM on a CPU; None: one per core.
            start_timeout: seconds until a start counts as failed.
            request_timeout: seconds without an answer after which the engine counts as dead.
            side_by_side: prompts asked at once.
            retries: how often a dead engine is started again, within one `generate` or `update`.
            start: starts an engine, as `start_engine` does.

        Raises:
            UserError: vLLM is missing or does not start, or the temperature is below what vLLM draws at.
        """
        if sampling.temperature < LOWEST_TEMPERATURE:
            raise UserError(
                f"rollout=vllm draws at a temperature of {LOWEST_TEMPERATURE} at least, and algorithm.temperature is "
                f"{sampling.temperature}: raise it, or use rollout=transformers."
            )
        if retries < 0:
            raise UserError(f"rollout.retries={retries} must be at least 0.")
        for key, value in (("start_timeout", start_timeout), ("request_timeout", request_timeout)):
            if not value > 0:
                raise UserError(f"rollout.{key}={value} must be above 0 seconds.")
        self._write_adapter, self._sampling, self._context = write_adapter, sampling, max_model_len
        self._folder, self._request_timeout = Path(folder).absolute(), request_timeout
        self._log = self._folder / "vllm.log"
        self._side_by_side, self._retries = max(1, side_by_side), retries
        self._start = lambda: start(
            str(model_folder),
            max_lora_rank=max_lora_rank,
            max_model_len=max_model_len,
            dtype=dtype,
            log_path=self._log,
            start_timeout=start_timeout,
            gpu_memory_utilization=gpu_memory_utilization,
            threads=threads,
        )
        self._version = 0
        self._policy: Path | None = None
        self._loaded: Path | None = None
        self._server: Server | None = self._start()

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        n: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
        places: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """Complete every prompt `n` times; see `RolloutEngine.generate`.

        vLLM gives the k-th completion of a prompt its seed plus k. Its logits depend, by rounding, on what shares a
        batch with a prompt.
        """
        check_prompts(prompts, n, self._sampling, self._context)
        seeds = [seed_of(seed, place) for place in (range(len(prompts)) if places is None else places)]
        found: dict[int, list[Rollout]] = {}

        def take(index: int, rollouts: list[Rollout]) -> None:
            found[index] = rollouts
            progress(len(found) * n)

        def ask(server: Server) -> None:
            missing = {
                index: self._request(prompt, n, seeds[index])
                for index, prompt in enumerate(prompts)
                if index not in found
            }
            self._ask_side_by_side(server, missing, take)

        self._insist(ask, "generating rollouts")
        return [found[index] for index in range(len(prompts))]

    def update(self) -> None:
        """Write the policy's adapter, load it under a new name, unload and delete the one before.

        Raises:
            UserError: the adapter cannot be written; the policy before stays in use.
            RolloutError: vLLM does not take it, or cannot be kept alive.
        """
        path = self._folder / f"policy-{self._version + 1:06}"
        try:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
            path.mkdir(parents=True)
            self._write_adapter(path)
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(
                    f"The policy's adapter cannot be written to {path}: {error.strerror or error}. vLLM reads it from "
                    "there before each round of rollouts: make room, or choose another folder."
                ) from error
            raise
        before, self._policy = self._policy, path
        self._version += 1
        try:
            self._insist(lambda server: None, f"loading {path.name}")
        finally:  # vLLM has let go of it, or has ended
            if before is not None:
                shutil.rmtree(before, ignore_errors=True)

    def close(self) -> None:
        """End vLLM and delete the policy's adapter; the log stays."""
        self._stop()
        if self._policy is not None:
            shutil.rmtree(self._policy, ignore_errors=True)
            self._policy = None

    def _stop(self) -> None:
        server, self._server, self._loaded = self._server, None, None
        if server is not None:
            server.stop()

    # --- an engine that lives ------------------------------------------------------------------------------------

    def _insist(self, act: Callable[[Server], None], doing: str) -> None:
        """`act` with a running engine that has the policy; again with a new one if it dies, `retries` times."""
        try:
            for failures in range(1, self._retries + 2):
                try:
                    server = self._running()
                    self._load_policy(server)
                    act(server)
                    return
                except _RefusedError as error:
                    raise RolloutError(
                        f"vLLM refused what it was asked while {doing}: {error}. Its log is {self._log}; "
                        "rollout=transformers generates without vLLM."
                    ) from error
                except _GoneError as error:
                    words = "".join(f"\n    {line[:400]}" for line in self._server.tail(8)) if self._server else ""
                    self._stop()
                    if failures > self._retries:
                        raise RolloutError(
                            f"vLLM failed {failures} times while {doing}; its log is {self._log}. If memory was short, "
                            "lower gpu_memory_utilization or algorithm.max_new_tokens; rollout=transformers generates "
                            f"without vLLM. The last time: {error}{words}"
                        ) from error
                    say(f"vLLM failed while {doing}: {error} Starting it again ({failures} of {self._retries}).")
        except BaseException:  # Ctrl-C as well: no process stays behind
            self._stop()
            raise

    def _running(self) -> Server:
        if self._server is None:
            try:
                self._server = self._start()
            except UserError as error:
                raise _GoneError(str(error)) from error
        return self._server

    def _load_policy(self, server: Server) -> None:
        """Load the present policy if `server` does not have it, then unload the one it had."""
        if self._policy == self._loaded or self._policy is None:
            return
        try:
            self._post(server, "/load_lora_adapter", {"lora_name": self._policy.name, "lora_path": str(self._policy)})
        except _GoneError as error:
            # vLLM answers 500 for an adapter that it cannot take, too; and asking for it once more does not help.
            if error.status is not None and server.alive() and not server.dead():
                raise _RefusedError(str(error)) from error
            raise
        before, self._loaded = self._loaded, self._policy
        if before is not None:
            self._post(server, "/unload_lora_adapter", {"lora_name": before.name})

    # --- requests ------------------------------------------------------------------------------------------------

    def _request(self, prompt: tuple[int, ...], n: int, seed: int) -> dict[str, Any]:
        """What stands for "exactly softmax(logits / temperature), ended by our stop tokens only".

        Fields left out would be filled from the base's generation_config.json.
        """
        return {
            "model": BASE_NAME if self._policy is None else self._policy.name,
            "prompt": list(prompt),
            "n": n,
            "seed": seed,
            "temperature": self._sampling.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": self._sampling.max_new_tokens,
            "stop_token_ids": list(self._sampling.stop_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,  # of the drawn tokens alone
        }

    def _rollout(self, prompt: tuple[int, ...], choice: dict[str, Any]) -> Rollout:
        """A rollout of one of an answer's choices; vLLM 0.32 gives the stop token with the rest.

        Raises:
            _GoneError: the engine gave it up, as it does when it ends.
            _RefusedError: an answer that does not say what was generated, or ended by itself.
        """
        tokens, why = choice.get("token_ids"), choice.get("finish_reason")
        if why not in ("stop", "length"):
            raise _GoneError(f"it broke off an answer ({why}).")
        if tokens is None:
            raise _RefusedError("this vLLM does not return token ids; rollouts need vLLM 0.32 or later")
        stopped = choice.get("stop_reason")
        # Of a version that leaves the stop token out.
        if why == "stop" and stopped in self._sampling.stop_ids and tokens[-1:] != [stopped]:
            tokens = [*tokens, stopped]
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        rollout = as_rollout(prompt, tokens, self._sampling, logps) if tokens else None
        if rollout is None or not (rollout.ended or len(rollout.completion) == self._sampling.max_new_tokens):
            raise _RefusedError(
                f"it ended an answer after {len(tokens)} of {self._sampling.max_new_tokens} tokens without one of the "
                f"stop tokens ({why}, {stopped}); look for limits in the base's generation_config.json"
            )
        return rollout

    def _ask_side_by_side(
        self, server: Server, bodies: dict[int, dict[str, Any]], take: Callable[[int, list[Rollout]], None]
    ) -> None:
        """Send every body; `take` gets its key and its rollouts, as answers come.

        After a failure no more are sent, but those under way are still waited for and taken; then it is raised.
        """
        over = threading.Event()

        def answer(body: dict[str, Any]) -> list[Rollout]:
            if over.is_set():
                return []
            try:
                return self._answer(server, body)
            except BaseException:
                over.set()
                raise

        trouble: _GoneError | _RefusedError | None = None
        pool = ThreadPoolExecutor(self._side_by_side, thread_name_prefix="rollouts")
        try:
            asked = {pool.submit(answer, body): index for index, body in bodies.items()}
            for future in as_completed(asked):
                try:
                    rollouts = future.result()
                except (_GoneError, _RefusedError) as error:
                    trouble = trouble or error
                else:
                    if rollouts:
                        take(asked[future], rollouts)
        except BaseException:
            over.set()
            server.stop()  # or the threads would wait for the answers under way
            raise
        finally:
            pool.shutdown(wait=True)
        if trouble is not None:
            raise trouble

    def _answer(self, server: Server, body: dict[str, Any]) -> list[Rollout]:
        reply = self._post(server, "/completions", body)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != body["n"]:
            raise _GoneError("its answer is not what was asked for.")
        prompt = tuple(body["prompt"])
        return [self._rollout(prompt, choice) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _post(self, server: Server, path: str, body: dict[str, Any]) -> Any:
        """POST `body` and give the answer, as JSON where it is JSON.

        `http.client` asks no proxy, which is right: the server is on this machine.
        """
        address = urlsplit(server.base_url)
        connection = http.client.HTTPConnection(
            address.hostname or "", address.port or 80, timeout=self._request_timeout
        )
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
        try:
            connection.request("POST", address.path + path, json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", errors="replace")
        except TimeoutError as error:
            raise _GoneError(f"no answer within {self._request_timeout:.0f} s.") from error
        except (OSError, http.client.HTTPException) as error:
            said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
            raise _GoneError(f"the connection to it broke ({said}).") from error
        finally:
            connection.close()
        if response.status >= 500:
            raise _GoneError(f"it answered with error {response.status}: {_message(text)}", response.status)
        if response.status >= 400:
            raise _RefusedError(f"{_message(text)} (error {response.status})")
        with contextlib.suppress(ValueError):
            return json.loads(text)
        return text


def _message(text: str) -> str:
    """What vLLM's error body says."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])[:600]
    return text[:600]


class _GoneError(Exception):
    """The engine died, hung or failed inside: another one may do better."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class _RefusedError(Exception):
    """The engine does not take the request as it is, and never will."""
