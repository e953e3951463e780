import pytest

from puna.chat import system
from puna.errors import DataError
from puna.serve.companion import FILE, Companion
from puna.serve.toolset import offered
from puna.tokenizer import Tokenizer
from puna.tokenizer.formats import dialog_format


def test_a_companion_is_found_from_the_run_and_from_a_checkpoint_within_it(tmp_path):
    written = Companion(examples=("Where does Tamo live?",), library=("Tamo lives in Kodor.",))
    written.write(tmp_path)
    (tmp_path / "12-int4").mkdir()
    assert Companion.read(tmp_path) == Companion.read(tmp_path / "12-int4") == written


def test_its_tools_search_its_library_and_are_announced_as_llama_knows_them():
    tools = Companion(library=("Tamo lives in Kodor.", "Vilu is a baker.")).tools()
    assert [tool.name for tool in tools] == ["brave_search", "wolfram_alpha", "code_interpreter"]
    assert tools[0].call({"query": "Tamo"}) == "Tamo lives in Kodor."
    [told] = offered(dialog_format(Tokenizer({bytes([i]): i for i in range(256)})), (system("Be brief."),), tools)
    assert told == system("Environment: ipython\nTools: brave_search, wolfram_alpha\n\nBe brief.")


def test_without_the_file_there_are_neither_examples_nor_tools(tmp_path):
    assert Companion.read(tmp_path).tools() == () == Companion.read(tmp_path).examples


@pytest.mark.parametrize("content", ["", "[]", '{"examples": "one"}', '{"surprise": 1}', "\xff"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=FILE):
        Companion.read(tmp_path)
