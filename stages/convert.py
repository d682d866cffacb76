"""From a fine-tune to a checkpoint that vLLM serves: python stages/convert.py MODEL=... [NAME=value ...] [key=value ...]

MODEL     a directory with a fine-tune or an adapter, a Hub repository such as me/my-finetune, or a name of conf/model/
ADAPTER   adapters to serve beside it: directories or Hub repositories, with commas between them
BASE      the base of an adapter, where what its adapter_config.json names is not here
DTYPE     of everything that is not 4-bit: float16 (default), bfloat16 or float32
NAME      what the result is called below artifacts/
REVISION  commit, branch or tag of a Hub repository
SMOKE     yes: also generate with vLLM and compare with transformers

key=value are settings as configure.py takes them. It configures, converts on all cores, proves, and says how to serve the
result. What is done already is not done again.
"""

from ending import end_together

# isort: split
import os
import re
import shlex
import shutil
import sys

from common import ROOT
from configure import configure, said
from given import repository_as_model, unquoted
from omegaconf import DictConfig
from parallel import repro
from serve import command

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.model import base_on_hub
from gptoss_nf4.source.refused import repository_of

# What a word given in capitals sets.
SETTINGS = {"BASE": "model.base", "DTYPE": "dtype", "NAME": "model.name", "REVISION": "model.revision"}
WORDS = ("MODEL", "ADAPTER", *SETTINGS, "SMOKE")
OWN_MODELS = {"local", "hub"}  # of conf/model/: these need a place
WORD = re.compile(r"([A-Z]+)=(.*)", re.DOTALL)


def split(typed: list[str]) -> tuple[dict[str, str], list[str]]:
    """(what is given by a word in capitals, the other arguments). UserError for an unknown word."""
    words, others = {}, []
    for argument in typed:
        word = WORD.fullmatch(argument)
        if word is None:
            others.append(argument)
        elif word[1] in WORDS:
            words[word[1]] = word[2]
        else:
            raise UserError(
                "no such argument",
                where="make convert",
                got=argument,
                expected=f"one of {', '.join(WORDS)}",
                next_step="see `python stages/convert.py --help`",
            )
    return {word: value for word, value in words.items() if value}, others


def model_arguments(words: dict[str, str], of_adapter: str | None = None) -> tuple[list[str], list[str]]:
    """(the arguments of configure.py that choose the model of MODEL, adapters to serve beside it).

    A path on this machine comes first, then a name of conf/, then the Hub. An adapter's repository there chooses its base.

    of_adapter: the adapter whose base MODEL is. UserError where that is an adapter too.
    """
    given = words["MODEL"]
    here = os.path.lexists(os.path.expanduser(unquoted(given)))
    if not here and given in {path.stem for path in (ROOT / "conf/model").glob("*.yaml")} - OWN_MODELS:
        return [f"model={given}"], []
    repository = None if here else repository_of(given)
    if repository is None:
        return ["model=local", f"model.path={given}"], []
    base = base_on_hub(repository, words.get("REVISION"))
    if base is None:
        return repository_as_model(repository), []
    if of_adapter is not None:
        raise UserError(
            "adapter on an adapter",
            where=of_adapter,
            got=f"base {repository}, which is an adapter of {base}",
            expected="a base that is a model",
            next_step="merge the inner adapter in Unsloth, or pass BASE= with the model itself",
        )
    if "REVISION" in words:
        raise UserError(
            "REVISION of an adapter",
            where=repository,
            got=words["REVISION"],
            expected="none: it would be the base's",
            next_step=f"pass MODEL={base} and ARGS='adapters={{mine: {{repository: {repository}, revision: ...}}}}'",
        )
    base = words.pop("BASE", base)
    print(f"{repository} is an adapter; its base is converted ({base})")
    chosen, more = model_arguments({"MODEL": base}, of_adapter=repository)
    return chosen, [*more, repository]


def adapter_places(given: str) -> list[str]:
    """The places of ADAPTER. A comma separates two, unless the whole is a path."""
    if os.path.lexists(os.path.expanduser(unquoted(given))):
        return [given]
    return [place for place in (part.strip() for part in given.split(",")) if place]


def configured(typed: list[str]) -> tuple[DictConfig, bool]:
    """(the settings, now in params.yaml; whether smoke is asked for). UserError for what cannot be converted."""
    words, others = split(typed)
    if "MODEL" not in words:
        raise UserError(
            "no model",
            where="make convert",
            got="no MODEL",
            expected="a directory, an adapter's directory or a Hub repository",
            next_step="run `make convert MODEL=/data/my-finetune`, or `make convert MODEL=tiny` for the embedded model",
        )
    chosen, adapters = model_arguments(words)
    engine = "gpu" if shutil.which("nvidia-smi") else "cpu"
    settings = [f"{SETTINGS[word]}={value}" for word, value in words.items() if word in SETTINGS]
    adapters += adapter_places(words.get("ADAPTER", ""))
    if words.get("SMOKE", "yes") != "yes":
        raise UserError(
            "bad SMOKE",
            where="make convert",
            got=words["SMOKE"],
            expected="yes, or no SMOKE at all",
            next_step="pass SMOKE=yes to generate and compare too",
        )
    return configure([*chosen, f"engine={engine}", *settings, *others], adapters), "SMOKE" in words


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    end_together()
    try:
        cfg, smoke = configured(sys.argv[1:])
        print(said(cfg), flush=True)
        targets = ["prove", *(f"adapter@{name}" for name in cfg.adapters)]
        targets += ["smoke", *(f"smoke-adapter@{name}" for name in cfg.adapters)] if smoke else []
        if status := repro(targets):
            sys.exit(status)
        line = shlex.join(command(cfg))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("convert: interrupted; run the command again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for threads
    print("To serve it: `make serve`, or this, after `source .venv/bin/activate`:")
    print(line)


if __name__ == "__main__":
    main()
