"""Data: sources, order, crops and the collator; every draw a function of where it happens."""

from itertools import chain

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config, tiny_model
from torch.utils.data import DataLoader

from ijepa_hf import IJepaDataCollator, draw_masks
from ijepa_hf.data.collator import BatchMaker
from ijepa_hf.data.loader import PlainLoader
from ijepa_hf.data.order import SampleKey, StepBatchSampler
from ijepa_hf.data.reading import CropReader, ImageRows, PretrainingImages, crop_numbers, resized_pixels
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.data.sources.opening import ImageSource, find_image_column, load_split
from ijepa_hf.data.transforms import CROP_NUMBERS
from ijepa_hf.randomness import DRAW_CROP, keyed_generator


@pytest.fixture(scope="module")
def digits():
    return load_digits("train")


@pytest.fixture
def photos(tmp_path):
    """A folder of three small pictures of different sizes and kinds, without classes."""
    rng = np.random.default_rng(0)
    for number, (mode, size) in enumerate((("RGB", (40, 30)), ("L", (33, 64)), ("RGBA", (50, 50)))):
        bands = len(Image.new(mode, (1, 1)).getbands())
        pixels = rng.integers(0, 256, (*size[::-1], bands), dtype=np.uint8).squeeze()
        Image.fromarray(pixels, mode=None).save(tmp_path / f"{number}.png")
    return tmp_path


# -- images ----------------------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_named_with_its_place_and_path(photos):
    (photos / "1.png").write_bytes(b"no picture")
    dataset = load_split(ImageSource(str(photos)), "train")
    rows = ImageRows(dataset, "image", 3)
    with pytest.raises(ValueError, match=r"image 1 of the data set: .*1\.png"):
        rows[1]
    assert rows[0].size == (40, 30)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_array_columns_of_many_bands_keep_their_numbers_range(dtype):
    scale = {"uint8": 255, "uint16": 65535, "float32": 1.0}[dtype]
    values = (np.random.default_rng(0).random((2, 5, 16, 24)) * scale).astype(dtype)
    features = datasets.Features({"bands": datasets.Array3D((5, 16, 24), dtype)})
    dataset = datasets.Dataset.from_dict({"bands": list(values)}, features=features)
    config = tiny_config(num_channels=5, image_size=[16, 24])
    rows = ImageRows(dataset, find_image_column(dataset), 5)
    pixels = resized_pixels([rows[0], rows[1]], config, [0.0] * 5, [1.0] * 5)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), values.astype(np.float64) / scale, atol=1e-6)


# -- order -----------------------------------------------------------------------------------------------------------


@given(
    samples=st.integers(16, 60),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 2),
    ranks=st.integers(1, 2),
    start=st.integers(0, 5),
)
def test_order_covers_an_epoch_once_resumes_exactly_and_does_not_depend_on_the_split(
    samples, batch, accumulation, ranks, start
):
    size = batch * accumulation * ranks
    steps = 2 * (samples // size) + 1

    def global_batches(batch, accumulation, ranks, start=0):
        samplers = [
            StepBatchSampler(
                samples, batch, steps, 3, start_step=start, accumulation_steps=accumulation, rank=rank, num_ranks=ranks
            )
            for rank in range(ranks)
        ]
        micro = list(zip(*samplers, strict=True))
        flat = [[key for part in row for key in part] for row in micro]
        return [list(chain(*flat[i : i + accumulation])) for i in range(0, len(flat), accumulation)]

    whole = global_batches(size, 1, 1)
    assert global_batches(batch, accumulation, ranks) == whole
    start = min(start, steps)
    assert global_batches(batch, accumulation, ranks, start) == whole[start:]
    per_epoch = samples // size
    epoch = [key for row in whole[:per_epoch] for key in row]
    assert len({key.image for key in epoch}) == len(epoch) == per_epoch * size
    assert [key.slot for key in whole[0]] == list(range(size))
    assert whole[per_epoch][0].epoch == 1


def test_epochs_and_seeds_have_different_orders():
    def first_epoch(seed, epoch):
        keys = [key for row in StepBatchSampler(40, 10, 8, seed) for key in row]
        return [key.image for key in keys if key.epoch == epoch]

    assert sorted(first_epoch(0, 0)) == sorted(first_epoch(0, 1)) == list(range(40))
    assert len({tuple(first_epoch(*place)) for place in ((0, 0), (0, 1), (1, 0))}) == 3


def test_a_set_smaller_than_one_global_batch_is_refused_with_a_size_that_works():
    with pytest.raises(
        ValueError, match="50 images, fewer than one global batch of 64 .*--per_device_train_batch_size 12"
    ):
        StepBatchSampler(50, 16, 1, 0, accumulation_steps=2, num_ranks=2)


# -- crops and batches -----------------------------------------------------------------------------------------------


def test_a_crop_depends_on_seed_step_and_slot_and_not_on_the_epoch(digits):
    rows = ImageRows(digits, "image", 3)
    images = PretrainingImages(rows, CropReader(rows.images, (32, 32), 0.3, seed=5))
    crop = images[SampleKey(1, 30, 2, 17)]["pixel_values"]
    assert crop.dtype == torch.uint8
    assert torch.equal(crop, images[SampleKey(2, 30, 2, 17)]["pixel_values"])
    other_seed = PretrainingImages(rows, CropReader(rows.images, (32, 32), 0.3, seed=6))
    others = [images[SampleKey(1, 30, 3, 17)], images[SampleKey(1, 31, 2, 17)], other_seed[SampleKey(1, 30, 2, 17)]]
    assert not any(torch.equal(crop, other["pixel_values"]) for other in others)


def test_rows_asked_for_together_are_those_asked_for_one_by_one(digits):
    rows = ImageRows(digits, "image", 3)
    images = PretrainingImages(rows, CropReader(rows.images, (32, 32), 0.3, seed=5))
    in_turn = [SampleKey(0, 3, 7 + place, image) for place, image in enumerate((17, 3, 17, 900))]
    for keys in (in_turn, in_turn[::-1], [*in_turn, SampleKey(0, 4, 11, 5)]):
        for key, sample in zip(keys, images.__getitems__(keys), strict=True):
            assert sample["sample_key"] == key
            assert torch.equal(sample["pixel_values"], images[key]["pixel_values"])
    assert [row["image"]["bytes"] for row in rows.raw_rows(range(2, 5))] == [
        rows.rows[number]["image"]["bytes"] for number in (2, 3, 4)
    ]


def test_the_numbers_of_a_step_are_one_generators_a_row_for_each_slot():
    whole = keyed_generator(4, DRAW_CROP, 9).random((12, CROP_NUMBERS))
    for first, count in ((0, 12), (1, 1), (5, 7), (11, 1)):
        keys = [SampleKey(0, 9, slot, 99 - slot) for slot in range(first, first + count)]
        assert crop_numbers(4, keys) == whole[first : first + count].tolist()


def test_a_crop_that_cannot_be_drawn_is_refused_before_any_image_is_read(digits):
    column = ImageRows(digits, "image", 3).images
    with pytest.raises(ValueError, match=r"min_crop_scale=1.5 must be in \(0, 1\]"):
        CropReader(column, (32, 32), 1.5, seed=0)
    with pytest.raises(ValueError, match=r"size=\(32, 0\) must be"):
        CropReader(column, (32, 0), 0.3, seed=0)


def loader(digits, workers=0, batch=6, accumulation=1, rank=0, ranks=1):
    config = tiny_config()
    sampler = StepBatchSampler(60, batch, 3, 0, accumulation_steps=accumulation, rank=rank, num_ranks=ranks)
    rows = ImageRows(digits, "image", 3)
    images = PretrainingImages(rows, CropReader(rows.images, config.image_shape, 0.5, 0))
    make_batch = BatchMaker(IJepaDataCollator(config, seed=0, global_batch_size=sampler.global_batch_size))
    batches = PlainLoader(images, make_batch, batch_sampler=sampler, num_workers=workers)
    return [batch.inputs for batch in batches]


def test_batches_do_not_depend_on_the_number_of_workers(digits):
    for one, other in zip(loader(digits), loader(digits, workers=2), strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_ranks_and_micro_batches_are_slices_of_the_one_global_batch(digits):
    whole = loader(digits, batch=8)
    first, second = (loader(digits, batch=2, accumulation=2, rank=rank, ranks=2) for rank in (0, 1))
    for step, batch in enumerate(whole):
        for name in batch:
            parts = [part[2 * step + micro][name] for micro in (0, 1) for part in (first, second)]
            assert torch.equal(torch.cat(parts), batch[name]), name


def test_masks_of_a_step_are_those_of_its_key(digits):
    batch = loader(digits, batch=8)[0]
    masks = draw_masks(tiny_config().mask_settings(), 8, keyed_generator(0, 3, 0))
    assert torch.equal(batch["context_indices"], masks.context_indices)
    assert torch.equal(batch["target_indices"], masks.target_indices)


def test_collator_normalises_as_the_image_processor_does_unless_told_not_to():
    config = tiny_config()
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": pixels}] * 2
    raw = IJepaDataCollator(config, normalize=False)(rows)["pixel_values"]
    assert raw.dtype == torch.uint8
    assert torch.equal(raw[1], pixels)
    floats = IJepaDataCollator(config)(rows)["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(floats, (pixels / 255 - mean) / std, atol=1e-6, rtol=0)


def test_8_bit_and_float_images_of_one_batch_become_floats_of_one_range():
    rows = [
        {"pixel_values": torch.full((3, 32, 32), 51, dtype=torch.uint8)},
        {"pixel_values": torch.full((3, 32, 32), 0.2)},
    ]
    pixels = IJepaDataCollator(tiny_config(), normalize=False)(rows)["pixel_values"]
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0], pixels[1])


def test_collator_works_alone_in_anybodys_loader(digits):
    def batches():
        torch.manual_seed(3)
        collator = IJepaDataCollator(tiny_config(), min_crop_scale=0.5)
        return list(DataLoader(digits.select(range(8)), batch_size=4, collate_fn=collator))

    for one, other in zip(batches(), batches(), strict=True):
        assert one.keys() == {"pixel_values", "context_indices", "target_indices"}
        assert one["pixel_values"].shape == (4, 3, 32, 32)
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="no image column"):
        IJepaDataCollator(tiny_config())([{"label": 3}])
    with pytest.raises(ValueError, match="image_mean has 3 values, but num_channels=5"):
        IJepaDataCollator(tiny_config(num_channels=5))


def test_collator_refuses_rows_of_two_steps(digits):
    images = ImageRows(digits, "image", 3)
    images = PretrainingImages(images, CropReader(images.images, (32, 32), 1.0, 0))
    rows = [images[SampleKey(0, step, 0, 0)] for step in (0, 1)]
    with pytest.raises(ValueError, match="consecutive slots of one step"):
        IJepaDataCollator(tiny_config())(rows)


def test_the_transformers_trainer_trains_with_the_collator_and_an_ema_callback(digits, tmp_path):
    class MovingAverage(transformers.TrainerCallback):
        updates = 0

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.update_target_encoder(0.9)
            self.updates += 1

    model, callback = tiny_model(), MovingAverage()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=digits,
        eval_dataset=digits.select(range(16)),
        data_collator=IJepaDataCollator(model.config),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.updates == 4
    assert trainer.evaluate()["eval_loss"] > 0
    after = model.state_dict()
    for part in ("ijepa", "context_encoder", "predictor"):
        changed = [name for name in after if name.startswith(part) and not torch.equal(after[name], before[name])]
        assert changed, part
