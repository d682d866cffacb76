"""bitsandbytes without PyTorch's compiler: until something else has loaded it."""

import sys

from gptoss_nf4 import eager_bnb


def test_a_kernel_is_hidden_from_the_compiler_once_it_is_loaded(monkeypatch):
    hidden = []

    def hides(function):
        return lambda *arguments: hidden.append(arguments) or function(*arguments)

    monkeypatch.setattr(eager_bnb, "_disable_dynamo", hides)
    call = eager_bnb._hidden_once_it_is_loaded(lambda number: number + 1)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert (call(1), hidden) == (2, [])
    monkeypatch.setitem(sys.modules, "torch._dynamo", sys)
    assert (call(1), hidden) == (2, [(1,)])
