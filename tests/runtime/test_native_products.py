"""The kernel for products with few rows: right for every shape, made once, and done without where it cannot be made."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from falcon_hf.runtime import few_rows, native_kernel, native_products
from falcon_hf.runtime.few_rows import few_row_linear
from falcon_hf.runtime.native_products import has_native_products, native_product, takes_natively, takes_tiles

from .helpers import drawn

# Elsewhere there is nothing to test here but that products are made without it, which test_few_rows.py holds.
HAS_AVX2 = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
SERVED = HAS_AVX2 and COMPILER is not None
pytestmark = pytest.mark.skipif(not SERVED, reason="the kernel needs Linux, AVX2 and a C++ compiler")


@pytest.fixture
def unmade(monkeypatch, tmp_path):
    """As before the first generation on this machine; the cache is the folder this gives."""
    monkeypatch.setattr(native_kernel, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native_kernel.compiled_kernel.cache_clear()
    yield tmp_path / "falcon_hf"
    native_kernel.compiled_kernel.cache_clear()


def allowed(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The error that a sum in float32, rounded once to ``dtype``, may have."""
    return 1e-4 + exact.abs() * (2**-8 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [*range(1, 34), 40, 64])
def test_products_are_those_of_linear(rows, dtype):
    for outputs, size in ((1, 16), (2, 32), (25, 48), (16, 32), (71, 576)):  # the last two fit tiles
        x, weight = drawn(rows, size).to(dtype), drawn(outputs, size, seed=1).to(dtype)
        assert takes_natively(x, weight)
        y = native_product(x, weight)
        exact = F.linear(x.double(), weight.double())
        assert (y.dtype, y.shape) == (dtype, (rows, outputs))
        assert ((y.double() - exact).abs() <= allowed(exact, dtype)).all()
        wrong = native_product(x.flip(1), weight)  # the control
        assert not ((wrong.double() - exact).abs() <= allowed(exact, dtype)).all()


def test_a_cpu_without_the_wider_vectors_multiplies_right_too(unmade, monkeypatch):
    flags = tuple(flag.replace("-mavx512f", "-mavx2") for flag in native_kernel._FLAGS)
    monkeypatch.setattr(native_kernel, "_FLAGS", flags)
    weight = drawn(71, 48, seed=1)
    for rows in (1, 2, 3, 5, 6, 7, 13):
        x = drawn(rows, 48)
        exact = F.linear(x.double(), weight.double())
        assert ((native_product(x, weight).double() - exact).abs() <= allowed(exact, torch.float32)).all()


def test_half_precision_is_rounded_once():
    for size in (48, 64):
        x, weight = drawn(7, size).bfloat16(), drawn(40, size, seed=1).bfloat16()
        nearest = F.linear(x.double(), weight.double()).bfloat16()
        assert (native_product(x, weight) == nearest).float().mean() > 0.98  # the others lie between two numbers
        twice = sum(native_product(x[:, part], weight[:, part].contiguous()) for part in (slice(32), slice(32, size)))
        assert (twice == nearest).float().mean() < 0.9  # the control


def test_several_weights_are_multiplied_as_each_alone():
    for dtype, sizes in ((torch.float32, (1, 24, 25, 100)), (torch.bfloat16, (16, 31, 100, 32))):
        x = drawn(5, 32).to(dtype)
        weights = [drawn(outputs, 32, seed=outputs).to(dtype) for outputs in sizes]
        together = native_products.native_products(x, weights)
        assert all(torch.equal(own, native_product(x, weight)) for own, weight in zip(together, weights, strict=True))


def test_rows_that_are_no_numbers_stay_so_and_touch_no_other():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = drawn(6, 32).to(dtype), drawn(30, 32, seed=1).to(dtype)
        clean = native_product(x, weight)
        x[2, 3], x[4, 0] = torch.nan, torch.inf
        y = native_product(x, weight)
        assert y[2].isnan().all()
        assert y[4].isinf().all()
        assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    x, weight, threads = drawn(7, 64).to(dtype), drawn(500, 64, seed=1).to(dtype), torch.get_num_threads()
    try:
        by_threads = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            by_threads.append(native_product(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(own, by_threads[0]) for own in by_threads)


def test_tiles_are_for_bfloat16_of_their_shapes_alone(monkeypatch):
    monkeypatch.setattr(native_products, "has_native_tiles", lambda: True)
    assert takes_tiles(drawn(16, 32).bfloat16())
    assert not takes_tiles(drawn(16, 32))
    assert not takes_tiles(drawn(15, 32).bfloat16())
    assert not takes_tiles(drawn(16, 48).bfloat16())
    monkeypatch.setattr(native_products, "has_native_tiles", lambda: False)
    assert not takes_tiles(drawn(16, 32).bfloat16())


@pytest.mark.parametrize(("fast", "tiles", "taken"), [(True, True, 1), (True, False, 0), (False, False, 1)])
def test_half_precision_is_torchs_where_it_has_instructions_and_the_kernel_no_tiles(monkeypatch, fast, tiles, taken):
    monkeypatch.setattr(few_rows, "_has_instructions", lambda dtype: fast and dtype == torch.bfloat16)
    monkeypatch.setattr(few_rows, "takes_tiles", lambda weight: tiles and weight.dtype == torch.bfloat16)
    monkeypatch.setattr(few_rows, "has_native_tiles", lambda: tiles)
    calls = []
    monkeypatch.setattr(few_rows, "native_product", lambda x, weight: calls.append(1) or F.linear(x, weight))
    few_row_linear(drawn(4, 32).bfloat16(), drawn(40, 32).bfloat16())
    assert len(calls) == taken
    assert (torch.bfloat16 in few_rows.native_dtypes()) is bool(taken)
    few_row_linear(drawn(4, 32), drawn(40, 32))
    assert len(calls) == taken + 1
    assert torch.float32 in few_rows.native_dtypes()


def test_torchs_own_products_stay_right_between_the_kernels():
    """Torch's may be made in tiles too; 2.13 sets them each time, and is right without the kernel's care."""
    x, weight = drawn(200, 96).bfloat16(), drawn(70, 96, seed=1).bfloat16()
    alone = F.linear(x, weight)
    for rows in (1, 5, 17):
        ours = native_product(x[:rows], weight)
        assert torch.equal(F.linear(x, weight), alone)
        assert torch.equal(native_product(x[:rows], weight), ours)


def test_what_it_does_not_take_is_left_to_torch():
    x, weight = drawn(4, 32), drawn(40, 32, seed=1)
    assert takes_natively(x, weight)
    assert not takes_natively(x.double(), weight.double())
    assert not takes_natively(x.bfloat16(), weight)
    assert not takes_natively(x[:, :24], weight[:, :24].contiguous())
    assert not takes_natively(x, drawn(32, 40).t())
    assert not takes_natively(x.to("meta"), weight.to("meta"))
    assert not takes_natively(x.to("meta"), weight)
    assert not takes_natively(drawn(4, 48), weight)
    assert not takes_natively(x, weight[0])
    assert not takes_natively(x.as_subclass(Subclass), weight)
    assert not takes_natively(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert takes_natively(x, weight.clone().requires_grad_())
    apart = drawn(4, 64)[:, ::2]
    assert torch.allclose(native_product(apart, weight), F.linear(apart, weight), atol=1e-4)


class Subclass(torch.Tensor):
    """A tensor that might see what is done with it."""


def test_memory_that_is_not_there_is_never_read():
    weight = drawn(40, 32)
    for x in (drawn(4, 48), drawn(4, 16), drawn(4, 32).to("meta"), drawn(4, 32).bfloat16()):
        with pytest.raises(ValueError, match="one dtype and width on a CPU"):
            native_product(x, weight)
    with pytest.raises(RuntimeError):
        few_row_linear(drawn(4, 48), weight)  # as torch would
    assert native_product(drawn(0, 32), weight).shape == (0, 40)
    assert native_products.native_products(drawn(4, 32), []) == []


def test_asked_for_where_there_is_none_it_says_so(monkeypatch):
    monkeypatch.setattr(native_products, "compiled_kernel", lambda: None)
    with pytest.raises(ValueError, match="no kernel"):
        native_product(drawn(4, 32), drawn(40, 32))


def test_it_is_made_whatever_the_default_device_is(unmade):
    with torch.device("meta"):
        assert has_native_products()


def test_it_is_made_once_and_kept(unmade, monkeypatch):
    assert has_native_products()
    assert [path.name for path in unmade.iterdir()] == [f"few_rows_{native_kernel.SOURCE_HASH}.so"]
    native_kernel.compiled_kernel.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # nothing is compiled again
    assert has_native_products()


def test_a_library_that_is_not_whole_is_made_again(unmade):
    library = unmade / f"few_rows_{native_kernel.SOURCE_HASH}.so"
    unmade.mkdir()
    library.touch()  # a machine that went down
    assert has_native_products()
    assert library.stat().st_size > 0


def test_a_library_that_others_could_have_written_is_not_loaded(unmade):
    assert has_native_products()
    (library,) = unmade.iterdir()
    planted = library.read_bytes()[:-1] + b"x"  # loads all the same
    library.unlink()
    library.write_bytes(planted)
    library.chmod(0o722)
    native_kernel.compiled_kernel.cache_clear()
    assert has_native_products()
    assert library.read_bytes() != planted


@pytest.mark.parametrize("asked", ["{} -DUNUSED=1", "false"])
def test_the_compiler_asked_for_is_used_with_its_options(unmade, monkeypatch, asked):
    monkeypatch.setenv("CXX", asked.format(COMPILER))
    assert has_native_products() is (asked != "false")


def test_a_cache_that_cannot_be_written_is_done_without(unmade):
    unmade.write_text("no folder")
    assert has_native_products()


def test_a_cache_from_which_nothing_may_be_run_is_done_without(unmade, monkeypatch):
    """A home folder mounted ``noexec``."""
    own = native_kernel._loaded

    def loaded(library):
        if library.is_relative_to(unmade):
            raise OSError("failed to map segment from shared object")
        return own(library)

    monkeypatch.setattr(native_kernel, "_loaded", loaded)
    assert has_native_products()
    assert list(unmade.iterdir()) == []


@pytest.mark.parametrize("how", ["no compiler", "fails", "wrong", "switched off"])
def test_without_it_products_are_torchs(unmade, monkeypatch, caplog, how):
    if how == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif how == "fails":
        monkeypatch.setenv("CXX", "false")
    elif how == "wrong":
        monkeypatch.setattr(native_kernel, "SOURCE", native_kernel.SOURCE.replace("+= weights[o]", "-= weights[o]"))
    else:
        monkeypatch.setenv(native_kernel.SWITCH, "0")
    with caplog.at_level(logging.WARNING):
        assert not has_native_products()
    told = {"no compiler": "there is no C++ compiler", "fails": "false ended with 1", "wrong": "multiplies wrong"}
    assert told.get(how, "") in caplog.text
    assert bool(caplog.text) is (how != "switched off")
    assert not unmade.exists() or not list(unmade.iterdir())  # nothing wrong is kept
    x, weight = drawn(4, 32), drawn(40, 32, seed=1)
    assert torch.allclose(few_row_linear(x, weight), F.linear(x, weight), atol=1e-4)


@pytest.mark.parametrize("broken", ["ps(0, 4, 6)", "ps(0, 6, 4"], ids=["wrong", "not compiled"])
def test_tiles_that_do_not_work_are_done_without(unmade, monkeypatch, caplog, broken):
    if not native_products.has_native_tiles():
        pytest.skip("needs a CPU with AMX and a compiler that knows it")
    native_kernel.compiled_kernel.cache_clear()
    shutil.rmtree(unmade)
    monkeypatch.setattr(native_kernel, "SOURCE", native_kernel.SOURCE.replace("ps(0, 6, 4)", broken))
    with caplog.at_level(logging.WARNING):
        assert has_native_products()
    assert not native_products.has_native_tiles()
    assert not caplog.text
    x, weight = drawn(4, 32).bfloat16(), drawn(40, 32, seed=1).bfloat16()
    assert torch.allclose(native_product(x, weight).float(), F.linear(x, weight).float(), atol=0.1)


def test_a_cpu_without_amx_makes_no_kernel_to_look_for_tiles(unmade, monkeypatch):
    monkeypatch.setattr(native_products, "_has_amx", lambda: False)
    assert not native_products.has_native_tiles()
    assert not unmade.exists()
