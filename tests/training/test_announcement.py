"""What a run says of itself before its first step."""

from tiny import tiny_run


def test_a_run_announces_its_masks_and_warns_where_they_are_hard_to_fit(tmp_path, capsys, caplog):
    tiny_run(tmp_path / "easy", max_train_steps=1, warmup_epochs=0)
    assert "16 context patches of 8x8, 4 targets" in capsys.readouterr().out
    assert "leaves little room" not in caplog.text
    tiny_run(tmp_path / "hard", max_train_steps=1, warmup_epochs=0, context_keep_ratio=0.5)
    assert "context_keep_ratio=0.5 leaves little room" in caplog.text
