"""Fine-tune a pretrained encoder for classification, with `transformers` and `datasets` alone.

    python examples/finetune.py runs/photographs path/to/pictures runs/classifier

MODEL is a run's folder or a Hub id, DATA a folder `train/<class>/*.png`, `test/<class>/*.png` or the Hub id of a data
set with columns `image` and `label`. Without torchvision, `AutoImageProcessor` needs transformers 5.18 or newer.
`ijepa-hf finetune` does the same with random crops, layer-wise learning rates, few-label draws and a safe resume.
"""

import argparse

import datasets
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description="Fine-tune an encoder for classification.")
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("output_dir")
parser.add_argument("--epochs", type=float, default=20)
parser.add_argument("--learning_rate", type=float, default=1e-3)
arguments = parser.parse_args()

images = datasets.load_dataset(arguments.data)
names = images["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(arguments.model)


def read(rows):
    """Turns rows of the data set into what the model takes."""
    pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor(rows["label"])}


model = AutoModelForImageClassification.from_pretrained(
    arguments.model, id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)}
)
if model.config.model_type == "ijepa":  # its position table is fixed in pretraining, but a parameter here
    model.ijepa.embeddings.position_embeddings.requires_grad = False
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=arguments.output_dir,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=32,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # below 1: a share of all steps
        eval_strategy="epoch",
        # No checkpoints, because resuming from one would go wrong: files keep the parameter names of transformers 4,
        # and `Trainer` skips, without an error, all names that the model does not have, so most of the weights.
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=images["train"].with_transform(read),
    eval_dataset=images["test"].with_transform(read),
    processing_class=processor,
    compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
)
trainer.train()
trainer.save_model()
print(f"top-1 {100 * trainer.evaluate()['eval_accuracy']:.1f} % of {len(images['test'])} held-out images")
