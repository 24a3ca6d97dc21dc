"""A C++ file becomes a library once, and a machine without a compiler does without."""

import shutil

import pytest

from model.kernels import compiled as module
from model.kernels.compiled import compiled

GXX = shutil.which("g++")
needs_a_compiler = pytest.mark.skipif(GXX is None, reason="no g++ on this machine")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("DROVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("DROVER_COMPILED", raising=False)
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    compiled.cache_clear()
    yield source
    compiled.cache_clear()


@needs_a_compiler
def test_compiled_once_and_again_only_where_the_text_is_another(source, monkeypatch):
    assert compiled(source).seven() == 7
    (kept,) = (source.parent / "cache" / "kernels").iterdir()
    compiled.cache_clear()  # as in another process
    monkeypatch.setattr(module, "_compile", lambda *args: pytest.fail("it was compiled a second time"))
    assert compiled(source).seven() == 7
    monkeypatch.undo()
    monkeypatch.setenv("DROVER_CACHE", str(kept.parents[1]))
    source.write_text('extern "C" int seven() { return 8; }')
    compiled.cache_clear()
    assert compiled(source).seven() == 8
    assert len(list(kept.parent.iterdir())) == 2


@needs_a_compiler
def test_what_does_not_compile_is_told_with_the_compilers_words(source, caplog):
    source.write_text("int seven( {")
    assert compiled(source) is None
    assert "seven.cpp could not be compiled by" in caplog.text
    assert "error: expected" in caplog.text
    assert not list((source.parent / "cache" / "kernels").iterdir())


def test_without_a_compiler_there_is_none(source, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    with caplog.at_level("INFO"):
        assert compiled(source) is None
    assert "no C++ compiler (CXX, g++, clang++, c++): seven.cpp is not used" in caplog.text


@needs_a_compiler
def test_cxx_names_the_compiler_and_a_variable_switches_it_off(source, tmp_path, monkeypatch):
    named = tmp_path / "mine"
    named.symlink_to(GXX)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    monkeypatch.setenv("CXX", str(named))
    used = []
    real = module._compile
    monkeypatch.setattr(
        module, "_compile", lambda source, compiler, library: (used.append(compiler), real(source, compiler, library))
    )
    assert compiled(source).seven() == 7
    assert used == [str(named)]
    compiled.cache_clear()
    monkeypatch.setenv("DROVER_COMPILED", "0")
    assert compiled(source) is None
