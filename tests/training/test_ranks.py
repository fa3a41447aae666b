"""What the processes of a run tell each other; with several of them see invariant/test_stopping.py."""

import pytest
import torch.distributed as dist

from ijepa_hf.training.ranks import LostRankError, Ranks


def test_one_process_agrees_with_itself():
    ranks = Ranks()
    assert ranks.highest(7) == 7
    assert ranks.gather("word") == ["word"]
    ranks.wait()


def test_errors_of_a_lost_process_are_named_and_others_are_not(monkeypatch):
    ranks = Ranks()
    ranks.number, ranks.rank = 2, 1
    lost = [RuntimeError("[/x/pair.cc:537] Connection closed by peer [127.0.0.1]:1710"), dist.DistBackendError("NCCL")]
    for error in lost:
        expected = pytest.raises(LostRankError, match=r"process 1 of 2 cannot go on: .* Try again\.")
        with expected, ranks.naming_the_lost("Try again."):
            raise error
    with pytest.raises(RuntimeError, match="shapes") as raised, ranks.naming_the_lost("Try again."):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, LostRankError)
    ranks.number = 1
    with pytest.raises(RuntimeError, match="closed") as raised, ranks.naming_the_lost("Try again."):
        raise RuntimeError("Connection closed by peer")
    assert not isinstance(raised.value, LostRankError)
