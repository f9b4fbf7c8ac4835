import os

from distkit.runtime.position import (
    BEATS,
    MICROBATCH,
    SENTENCE_BYTES,
    WAITS,
    Peer,
    Phase,
    Position,
    cells_of,
    page_of,
)


def peer(position: Position) -> Peer:
    return Peer(0, "node7", os.getpid(), "", True, position.cells, position.page)


def test_another_process_reads_where_this_one_is() -> None:
    position = Position(shared=True)
    position.enter(Phase.EVALUATION, 20)
    position.stand(True, "in all_reduce")
    page = page_of(os.getpid(), position.descriptor)
    position.close()
    other = Peer(1, "node7", 1, "", True, cells_of(page), page)
    assert (list(other.cells[:2]), other.cells[WAITS], other.sentence) == ([Phase.EVALUATION, 20], 1, "in all_reduce")
    position.stand(False, "")
    assert (other.cells[WAITS], other.sentence) == (0, "")


def test_a_long_sentence_is_cut_and_stays_readable() -> None:
    position = Position(shared=False)
    position.enter(Phase.STEP, 7)
    position.stand(False, "é" * SENTENCE_BYTES)
    assert set(peer(position).sentence) == {"é"}
    position.stand(False, "x" + "é" * SENTENCE_BYTES)
    assert peer(position).sentence.startswith("xé")
    assert list(position.cells[:2]) == [Phase.STEP, 7]


def test_a_microbatch_is_progress_and_a_beat_is_not() -> None:
    position = Position(shared=False)
    seen = peer(position)
    seen.look()
    since, place = seen.since, seen.place
    position.cells[BEATS] += 1
    seen.look()
    assert (seen.since, seen.place) == (since, place)
    position.cells[MICROBATCH] += 1
    seen.look()
    assert seen.place != place
    assert seen.since > since


def test_the_sentence_of_a_rank_elsewhere_is_what_it_sent() -> None:
    assert Peer(1, "node7", 1, "", False, [0], "in barrier").sentence == "in barrier"
