"""A Python that starts in milliseconds: `python SCRIPT` in a fork of a process that has imported what scripts import.

Each stage imports torch, DVC or vLLM, for a second or for thirteen, and tests start hundreds of stages. Here a server
imports the packages once, nothing of the project, and forks for each script. So a script runs the code of the checkout that
it lies in. `warm_vllm` is for tests that start vLLM themselves.

The PATH of `environment()` has this Python as `python`, and DVC as `dvc`. So what DVC and stages start is warm too. A test
that is about processes, about starting, or about what packages print while they are imported has to start the real one.
"""

import os
import sys
from _socket import AF_UNIX, CMSG_SPACE, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET, socket
from marshal import dumps, loads  # beside `socket` and `json`, which take longer to import than the rest of a client

# What a server imports, by its name. A fork is the quicker the less it has: few scripts need PyTorch.
DVC = (
    *("dvc.cli.parser", "dvc.repo.reproduce", "dvc.repo.index", "dvc.repo.metrics", "dvc.data_cloud", "dvc.output"),
    *("dvc.utils.strictyaml", "dvc.repo.experiments.queue.tempdir", "dvc.repo.experiments.queue.celery", "dvc_render"),
    *("dvc_data.hashfile.db.local", "scmrepo.git", "dulwich.client", "dulwich.repo", "ruamel.yaml", "platformdirs"),
    *("flatten_dict", "fsspec.implementations.memory", "pygit2"),
)
STAGES = ("hydra", "omegaconf._impl", "antlr4.LL1Analyzer", "numpy", "yaml", "jinja2", "psutil", "tqdm", "tokenizers")
TORCH = (*STAGES, "torch", "torch._dynamo", "safetensors.torch", "transformers.models.gpt_oss", "gptoss_nf4.eager_bnb")
VLLM = (  # not the plugin's kernels: whether Triton's interpreter runs them is settled by their import
    *("vllm.entrypoints.cli.main", "vllm.entrypoints.llm", "vllm.entrypoints.openai.api_server", "vllm.lora.request"),
    *("vllm.model_executor.models.gpt_oss", "transformers.models.gpt_oss.modeling_gpt_oss", "vllm.v1.engine.async_llm"),
    *("vllm.v1.engine.core", "vllm.v1.engine.llm_engine", "vllm.v1.executor.multiproc_executor"),
    "vllm.v1.worker.cpu_worker",
)
PACKAGES = {"dvc": (*DVC, *STAGES), "torch": TORCH, "vllm": (*TORCH, *VLLM)}
# Triton's own functions are made for its interpreter by their import. vLLM on a CPU uses none; some tests run kernels.
SETTINGS = {"vllm": {"TRITON_INTERPRET": "1"}}
OF_TORCH = ("fetch.py", "requant.py", "normalize.py", "prove.py", "adapter.py")
OF_VLLM = ("smoke.py", "smoke_adapter.py", "benchmark.py")
SIGKILL = 9
_made: dict[str, str] = {}


def environment() -> dict[str, str]:
    """The environment in which `python` and `dvc` are warm."""
    return os.environ | {"PATH": f"{place()}:{os.environ['PATH']}"}


def start(project: os.PathLike, *arguments: str) -> "Process":
    """A script of `project` that runs in a warm Python, unheard."""
    with open(os.devnull, "r+b") as null:
        return Process(place(), list(arguments), str(project), environment(), [null.fileno()] * 3)


class Process:
    """A script that runs. It leads a session of its own, so that a signal to its group reaches what it has started."""

    def __init__(
        self, directory: str, arguments: list[str], cwd: str, env: dict[str, str], fds: list[int], server: str = ""
    ) -> None:
        """`fds`: what becomes its standard input, output and error. `server`: of PACKAGES, else as the script needs."""
        self._connection, self.args = socket(AF_UNIX, SOCK_STREAM), arguments
        script = os.path.basename(arguments[0])
        server = server or ("vllm" if script in OF_VLLM else "torch" if script in OF_TORCH else "dvc")
        self._connection.connect(f"{directory}/{server}.socket")
        request = dumps((arguments, cwd, env))
        passed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        self._connection.sendmsg([len(request).to_bytes(8, "little")], [(SOL_SOCKET, SCM_RIGHTS, passed)])
        self._connection.sendall(request)
        self.pid = self._answer()
        self.returncode: int | None = None

    def kill(self, group: bool = False) -> None:
        """SIGKILL, to its group too. Nothing where it has ended."""
        try:
            (os.killpg if group else os.kill)(self.pid, SIGKILL)
        except ProcessLookupError:
            return

    def wait(self) -> int:
        """Its exit status; the negative number of the signal that killed it."""
        if self.returncode is None:
            self.returncode = self._answer()
            self._connection.close()
        return self.returncode

    def _answer(self) -> int:
        answer = self._connection.recv(8)
        assert answer, "the server is gone"
        return int.from_bytes(answer, "little", signed=True)


def place() -> str:
    """The directory with `python`, `dvc` and the servers' sockets, made when it is asked for first."""
    import atexit
    import shutil
    import subprocess
    import tempfile

    if not _made:
        directory = tempfile.mkdtemp(prefix="warm-")
        for name, module in (("python", ""), ("dvc", "-m dvc")):
            # -IS: the client needs no package, and would look for them all.
            command = f'exec "{sys.executable}" -IS "{os.path.abspath(__file__)}" "{directory}" {module} "$@"'
            path = os.path.join(directory, name)
            with open(path, "w") as file:
                file.write(f"#!/bin/sh\n{command}\n")
            os.chmod(path, 0o755)
        for name in PACKAGES:
            command = [sys.executable, os.path.abspath(__file__), "--serve", directory, name]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            # Elsewhere than in a test's directory, which goes before the packages are imported.
            env = os.environ | SETTINGS.get(name, {})
            server = subprocess.Popen(command, cwd=directory, env=env, start_new_session=True, **pipes)
            assert server.stdout.readline()
            atexit.register(server.wait)
            atexit.register(server.stdin.close)  # runs before the above
        atexit.register(shutil.rmtree, directory)
        _made["directory"] = directory
    return _made["directory"]


def serve(directory: str, name: str) -> None:
    """Import the packages when the first script is asked for. From then on fork, until whoever started this is gone."""
    import gc
    import importlib
    import select
    import signal

    listening = socket(AF_UNIX, SOCK_STREAM)
    listening.bind(f"{directory}/{name}.socket")
    listening.listen(64)
    print("listening", flush=True)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    scripts: dict[int, socket] = {}
    while sys.stdin not in (ready := select.select([listening, sys.stdin, ended], [], [])[0]):
        if ended in ready:
            os.read(ended, 4096)
            _tell_of_ended(scripts)
            continue
        connection = socket(fileno=listening._accept()[0])
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL:
            for module in PACKAGES[name]:
                importlib.import_module(module)
            for module in [module for module in sys.modules if module.startswith("gptoss_nf4")]:
                del sys.modules[module]  # a script has its own
            gc.collect()
            gc.freeze()
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
            signal.set_wakeup_fd(wake)
        request, fds = _received(connection)
        script = os.fork()
        if script == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if name == "vllm":
                _fork_for_spawn()
            _become(request, fds, f"{directory}/python")
        scripts[script] = connection
        connection.sendall(script.to_bytes(8, "little"))
        for fd in fds:
            os.close(fd)
    for script in scripts:
        os.killpg(script, SIGKILL)
    os._exit(0)  # without what packages do at their end: some print


def _tell_of_ended(scripts: dict[int, socket]) -> None:
    from contextlib import suppress

    while scripts:
        script, status = os.waitpid(-1, os.WNOHANG)
        if script == 0:
            return
        answer = os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True)
        connection = scripts.pop(script)
        with suppress(BrokenPipeError):  # nobody waits for it any more
            connection.sendall(answer)
        connection.close()


def _received(connection: socket) -> tuple[tuple, list[int]]:
    size, ancillary, _, _ = connection.recvmsg(8, CMSG_SPACE(3 * 4))
    passed = ancillary[0][2]
    data, whole = b"", int.from_bytes(size, "little")
    while len(data) < whole:
        data += connection.recv(whole - len(data))
    return loads(data), [int.from_bytes(passed[at : at + 4], sys.byteorder) for at in (0, 4, 8)]


def _fork_for_spawn() -> None:
    """What vLLM would start in a Python of its own, which would import all of it anew, is forked."""
    import multiprocessing

    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)


def _become(request: tuple, fds: list[int], python: str) -> None:
    """Do in this fork what `python ARGUMENTS` does. Never returns."""
    import atexit
    import multiprocessing.process
    import multiprocessing.util
    import runpy
    import threading

    status: object = 1
    try:
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        arguments, cwd, env = request
        os.chdir(cwd)
        multiprocessing.process.ORIGINAL_DIR = cwd
        os.environ.clear()
        os.environ.update(env)
        atexit._clear()  # what packages do at their end
        atexit.register(multiprocessing.util._exit_function)  # but processes that are left are waited for
        sys.executable = python
        module = arguments[1] if arguments[0] == "-m" else None
        sys.argv = arguments[1:] if module else arguments
        sys.path[0] = cwd if module else os.path.dirname(os.path.abspath(arguments[0]))
        try:
            if module:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def main() -> None:
    """As `python`: have a server run the script. What is none runs in the real Python."""
    directory, *arguments = sys.argv[1:]
    if not arguments or not (arguments[0].endswith(".py") or arguments[:2] == ["-m", "dvc"]):
        os.execv(sys.executable, [sys.executable, *arguments])
    status = Process(directory, arguments, os.getcwd(), dict(os.environ), [0, 1, 2]).wait()
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1] == "--serve" else main()
