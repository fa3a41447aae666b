from ijepa_hf import randomness
from ijepa_hf.randomness import keyed_generator


def test_keyed_generators_depend_on_every_number_of_the_key():
    draws = {key: keyed_generator(*key).random() for key in ((0,), (1,), (0, 1), (0, 1, 2), (0, 2, 1), (1, 0, 2))}
    assert len(set(draws.values())) == len(draws)
    assert all(keyed_generator(*key).random() == value for key, value in draws.items())


def test_no_two_purposes_share_a_number():
    numbers = [value for name, value in vars(randomness).items() if name.startswith("DRAW_")]
    assert len(set(numbers)) == len(numbers) > 10
