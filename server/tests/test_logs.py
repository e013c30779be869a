"""Log lines, as people and as the launcher read them."""

import json
import logging

import pytest
from loguru import logger
from text_generation_server.errors import ConfigError
from text_generation_server.logs import set_up

NASTY = "two\nlines with {braces} and <red>colours</red>"


@pytest.fixture(autouse=True)
def no_sinks_left():
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield
    logger.remove()
    root.handlers[:], root.level = kept, level


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capfd.readouterr()
    assert out == "", "standard output is for answers"
    return err.splitlines()


@pytest.mark.parametrize("rank", [None, 1])
def test_a_message_is_one_line_whatever_it_holds(capfd, rank):
    set_up("INFO", False, rank)
    logger.info(NASTY)
    (line,) = lines(capfd)
    assert line.endswith(("" if rank is None else "rank 1: ") + NASTY.replace("\n", "\\n"))
    assert " INFO " in line


def test_as_json_a_message_is_an_object_with_level_rank_and_place(capfd):
    set_up("INFO", True, 1)
    logger.warning(NASTY)
    (line,) = lines(capfd)
    record = json.loads(line)
    assert (record["level"], record["rank"], record["message"]) == ("WARNING", 1, NASTY)
    assert record["target"].startswith("test_logs:")


@pytest.mark.parametrize(("level", "count"), [("TRACE", 3), ("debug", 2), ("INFO", 1), ("ERROR", 0)])
def test_lines_below_the_level_are_left_out(capfd, level, count):
    set_up(level, False, None)
    logger.trace("a")
    logger.debug("b")
    logger.info("c")
    assert len(lines(capfd)) == count


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="--logger-level is 'LOUD', expected one of TRACE"):
        set_up("LOUD", False, None)


def test_what_kernels_say_through_pythons_own_logging_comes_the_same_way(capfd):
    set_up("INFO", True, 1)
    logging.getLogger("text_generation_server.kernels.cpu.quantized").info("%s: chosen", NASTY)
    logging.getLogger("text_generation_server.kernels").debug("below the level")
    logging.getLogger("some.library").info("of no interest")
    logging.getLogger("some.library").warning("of interest")
    first, second = map(json.loads, lines(capfd))
    assert (first["level"], first["rank"], first["message"]) == ("INFO", 1, f"{NASTY}: chosen")
    assert first["target"].startswith("text_generation_server.kernels.cpu.quantized:")
    assert (second["level"], second["message"]) == ("WARNING", "of interest")
