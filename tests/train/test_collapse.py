from dino.train.collapse import LINES, CollapseWatch


def said(entropy: float, loss: float, lines: int = LINES, settled_after: int = 0) -> list[list[str]]:
    watch = CollapseWatch(settled_after)
    numbers = {"teacher_entropy_relative": entropy, "loss_relative": loss}
    return [watch({"step": step, **numbers}) for step in range(1, lines + 1)]


def test_each_sign_is_said_once_and_only_when_it_lasts() -> None:
    for entropy, loss, words in [
        (0.001, 0.3, "raise model.teacher_temp"),
        (0.999, 0.999, "lower model.warmup_teacher_temp"),
        (0.6, 0.995, "raise optim.lr"),
    ]:
        found = said(entropy, loss, 3 * LINES)
        assert found[LINES - 1][0].count(words) == 1
        assert sum(map(len, found)) == 1


def test_a_healthy_run_and_a_warm_up_are_left_alone() -> None:
    assert not any(said(0.5, 0.8, 50))
    assert not any(said(0.999, 0.999, 50, settled_after=50))


def test_a_sign_that_goes_away_is_forgotten() -> None:
    watch = CollapseWatch(0)
    for step in range(5 * LINES):
        entropy = 0.5 if step % (LINES - 1) == 0 else 0.001
        assert not watch({"step": step + 1, "teacher_entropy_relative": entropy, "loss_relative": 0.5})
