"""The example of a classifier runs, with few steps."""

from tests.examples import example


def test_classifier(capsys):
    run = example("classifier")
    data, names = run.paragraphs()
    assert len(names) == 10
    assert len(data) > 500
    before, after = run.main(steps=8)
    assert 0 <= before <= 1
    assert after > before
    assert f"{before:.1%} are assigned" in capsys.readouterr().out
