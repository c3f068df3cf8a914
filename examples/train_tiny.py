# SPDX-License-Identifier: Apache-2.0
"""Train the tiny Vamba of `checkpoints/vamba-tiny` on synthetic videos drawn on the GPU as it trains.

    python examples/train_tiny.py --output checkpoints/vamba-tiny --minutes 8
    python examples/train_tiny.py --output checkpoints/vamba-tiny --resume checkpoints/vamba-tiny --longest 2048 \
        --learning-rate 6e-4 --minutes 8

The videos have 8 to `--longest` frames, as many of 8 to 16 frames as of 1,024 to 2,048. A step takes as many videos of
one length as `--frames` allows. At the end, the model is evaluated on videos that it has not seen, of these lengths
and of up to 4 times the longest. The folder holds all that `AutoModelForImageTextToText` and `AutoProcessor` load, and
the results as `evaluation.json`.
"""

import argparse
import itertools
import json
import math
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from synthetic_videos import FRAME_RATE, FRAME_SIZE, QUESTIONS, pack_videos, render_frames, sample_video
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from transformers_vamba import VambaConfig, VambaForConditionalGeneration, VambaProcessor, VambaVideoProcessor


SHORTEST = 8  # frames of a training video
MOST_VIDEOS = 256  # of a step
QUESTIONS_PER_VIDEO = 3
PIXELS_AT_ONCE = 2**28  # that are drawn at once
PATCH, MERGE = 14, 2
KINDS = list(QUESTIONS)
TRAINING_STREAM, EVALUATION_STREAM = 2026, 2027  # the first number of every seed: no video is in both

SPECIAL_TOKENS = (
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    + ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
)  # fmt: skip
# Qwen2-VL's, unchanged.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What it makes of one question, with the video's placeholder removed, as the processor does it.
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>"
    "{question}<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER = "{answer}<|im_end|>"


def make_tokenizer(vocab_size: int = 512) -> Qwen2Tokenizer:
    """Byte-level BPE like Qwen2's, its merges learned from the questions and answers."""
    videos = [sample_video([TRAINING_STREAM, i], 32) for i in range(300)]
    corpus = [question.answer for video in videos for question in video.questions]
    corpus += [text for texts in QUESTIONS.values() for text in texts] * 10
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 100
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size, new_special_tokens=SPECIAL_TOKENS)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.model_max_length = 4096
    return tokenizer


def make_processor(tokenizer) -> VambaProcessor:
    """Samples two frames a second and brings them to the size that the model is trained on."""
    return VambaProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=FRAME_SIZE**2, max_pixels=FRAME_SIZE**2),
        tokenizer=tokenizer,
        video_processor=VambaVideoProcessor(
            size={"shortest_edge": FRAME_SIZE, "longest_edge": FRAME_SIZE}, fps=FRAME_RATE
        ),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer) -> VambaConfig:
    token_id = tokenizer.convert_tokens_to_ids
    return VambaConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "num_heads": 4,
            "mlp_ratio": 4,
            "hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "initializer_range": 0.06,  # Qwen2-VL's 0.02 suits its own width
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "max_position_embeddings": 4096,
            "mamba_d_state": 32,
            "mamba_d_head": 32,
            "mamba_chunk_size": 64,
            "initializer_range": 0.06,
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


class QuestionBatches(IterableDataset):
    """Endless random batches of videos of one length, and of questions about each. See `make_batch`."""

    def __init__(self, tokenizer, frames, seed):
        self.tokenizer, self.frames, self.seed = tokenizer, frames, seed
        self.longest = torch.tensor(SHORTEST).share_memory_()  # raised as the training goes on, seen by the workers

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        seed = [TRAINING_STREAM, self.seed, worker.id if worker else 0]
        rng = np.random.default_rng(seed)
        for i in itertools.count():
            num_frames = sample_length(rng, SHORTEST, self.longest.item())
            videos = [sample_video([*seed, i, j], num_frames) for j in range(num_videos(self.frames, num_frames))]
            questions = [[video.questions[k] for k in rng.permutation(len(video.questions))] for video in videos]
            yield make_batch(self.tokenizer, videos, [chosen[:QUESTIONS_PER_VIDEO] for chosen in questions])


def sample_length(rng, shortest: int, longest: int) -> int:
    """An even number of frames: each doubling of the length is as likely as any other."""
    return 2 * round(math.exp(rng.uniform(math.log(shortest / 2), math.log(longest / 2))))


def num_videos(frames: int, num_frames: int) -> int:
    """How many videos of a length make up a batch of at most so many frames."""
    return min(MOST_VIDEOS, max(1, frames // num_frames))


def make_batch(tokenizer, videos, questions) -> dict:
    """Put videos of one length, and the questions to ask about each, into tensors.

    Each video has one row of text, with its questions one behind the other: the positions start again at 0 with each,
    so that they do not see one another. Returns `input_ids`, `position_ids` and `labels`, all (videos, tokens);
    `question_ids`, of the same shape: which question of the batch a token belongs to; `kinds` (questions): the index
    in `KINDS` of each; the videos as packed `scenes`, not drawn yet, and their `num_frames`."""
    tokenize = lru_cache(lambda text: tokenizer(text).input_ids)
    rows, kinds = [], []
    for row_questions in questions:
        row = []  # of (token, position, label, question)
        for question in row_questions:
            prompt = tokenize(PROMPT.format(question=question.text))
            answer = tokenize(ANSWER.format(answer=question.answer))
            ids, labels = prompt + answer, [-100] * len(prompt) + answer
            row += zip(ids, range(len(ids)), labels, [len(kinds)] * len(ids), strict=True)
            kinds.append(KINDS.index(question.kind))
        rows.append(row)
    length = 8 * math.ceil(max(len(row) for row in rows) / 8)
    text = torch.tensor([row + [(tokenizer.pad_token_id, 0, -100, 0)] * (length - len(row)) for row in rows])
    names = ("input_ids", "position_ids", "labels", "question_ids")
    return {
        **dict(zip(names, text.unbind(-1), strict=True)),
        "kinds": torch.tensor(kinds),
        "scenes": pack_videos(videos),
        "num_frames": videos[0].num_frames,
    }


def augment(frames: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Roughly what a camera or H.264 does to frames (videos, frames, 3, height, width), in 0 to 255. `amount` (4,
    videos, 1, 1, 1, 1), in 0 to 1: of blur, contrast, brightness and noise."""
    frames = frames.float()
    blurred = F.avg_pool2d(frames.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).view_as(frames)
    frames = frames.lerp(blurred, (amount[0] * 1.6 - 0.8).clamp(min=0))  # half of the videos stay sharp
    frames = frames * (0.9 + 0.2 * amount[1]) + (amount[2] * 20 - 10)
    frames = frames + torch.randn_like(frames) * (amount[3] * 12 - 6).clamp(min=0)
    return frames.clamp(0, 255).round()


def make_pixel_values(frames: torch.Tensor, processor) -> torch.Tensor:
    """What `VambaVideoProcessor` makes of frames of this size, for all videos at once and on their device.

    Args: frames (videos, frames, 3, height, width) in 0 to 255.
    Returns: float32 of shape (videos, patches, 3 * temporal_patch_size * patch_size * patch_size)."""
    video_processor = processor.video_processor
    mean = torch.tensor(video_processor.image_mean, device=frames.device).view(3, 1, 1) * 255
    std = torch.tensor(video_processor.image_std, device=frames.device).view(3, 1, 1) * 255
    patches, *_ = Qwen2VLVideoProcessor().patchify((frames - mean) / std, PATCH, MERGE, 2)
    return patches


def to_device(batch, device):
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def model_inputs(batch, processor, augmented: bool) -> dict:
    """Draw the videos of a batch, on its device and a stretch at a time, and return the arguments of the model."""
    videos, num_frames = len(batch["input_ids"]), batch["num_frames"]
    amount = torch.rand(4, videos, 1, 1, 1, 1, device=batch["input_ids"].device)
    at_once = 2 * max(1, PIXELS_AT_ONCE // (2 * videos * 3 * FRAME_SIZE**2))
    stretches = []
    for start in range(0, num_frames, at_once):
        frames = render_frames(batch["scenes"], start, min(start + at_once, num_frames))
        frames = augment(frames, amount) if augmented else frames.float()
        stretches.append(make_pixel_values(frames, processor))
    edge = FRAME_SIZE // PATCH
    return {
        **{name: batch[name] for name in ("input_ids", "position_ids", "labels")},
        "pixel_values_videos": torch.cat(stretches, dim=1).flatten(0, 1),
        "video_grid_thw": torch.tensor([[num_frames // 2, edge, edge]] * videos),
        "video_sample_ids": torch.arange(videos),
        "use_cache": False,
    }


def exact_answers(logits, batch) -> torch.Tensor:
    """For each question whether every token of its answer, the end included, is the likeliest one after the ones
    before it: then, and only then, greedy decoding gives exactly this answer."""
    labels, question_ids = batch["labels"][:, 1:], batch["question_ids"][:, 1:]
    wrong = (labels != -100) & (logits[:, :-1].argmax(-1) != labels)
    num_wrong = torch.zeros(len(batch["kinds"]), device=logits.device)
    return num_wrong.index_add(0, question_ids.flatten(), wrong.flatten().float()) == 0


class Score:
    """Exact answers by kind of question, added up on the device."""

    def __init__(self, device):
        self.right, self.asked = torch.zeros(2, len(KINDS), device=device)

    def add(self, exact, kinds):
        self.right.index_add_(0, kinds, exact.float())
        self.asked.index_add_(0, kinds, torch.ones_like(kinds, dtype=torch.float))

    def result(self) -> dict[str, float]:
        accuracy = (self.right / self.asked.clamp(min=1)).tolist()
        result = {kind: round(value, 4) for kind, value, n in zip(KINDS, accuracy, self.asked, strict=True) if n}
        return {"all": round((self.right.sum() / self.asked.sum().clamp(min=1)).item(), 4), **result}


def train(model, processor, args) -> None:
    device = torch.device(args.device)
    batches = QuestionBatches(processor.tokenizer, args.frames, args.seed)
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")
    # Matrices decay; vectors (norms, biases, alpha, and the mixers' A, D and dt) do not.
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    model.train()
    score, losses = Score(device), []
    start = time.perf_counter()
    for step, batch in enumerate(loader, start=1):
        progress = (time.perf_counter() - start) / (60 * args.minutes)
        if progress >= 1:
            break
        # Short videos first; all lengths after a third of the time. Linear warm-up, then cosine.
        reached = 1 if args.resume else min(1, 3 * progress)
        batches.longest.fill_(round(SHORTEST + (args.longest - SHORTEST) * reached))
        rate = min(step / 200, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate

        batch = to_device(batch, device)
        inputs = model_inputs(batch, processor, augmented=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            outputs = model(**inputs)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        losses.append(outputs.loss.detach())
        score.add(exact_answers(outputs.logits.detach(), batch), batch["kinds"])
        if step % args.log_every == 0:
            elapsed, loss = time.perf_counter() - start, torch.stack(losses).mean().item()
            accuracy = " ".join(f"{kind} {value:.2f}" for kind, value in score.result().items())
            longest = batches.longest.item()
            print(f"step {step} | {elapsed:.0f} s | to {longest} frames | loss {loss:.4f} | {accuracy}", flush=True)
            score, losses = Score(device), []
    print(f"trained for {step - 1} steps in {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


@torch.no_grad()
def evaluate(model, processor, args, shortest: int, longest: int) -> dict[str, float]:
    """Exact-match accuracy by kind of question, on unseen videos of `shortest` to `longest` frames."""
    model.eval()
    score = Score(args.device)
    rng = np.random.default_rng([EVALUATION_STREAM, longest])
    asked = 0
    while asked < args.eval_videos:
        num_frames = sample_length(rng, shortest, longest)
        batch_size = min(num_videos(args.frames, num_frames), math.ceil(args.eval_videos / 8))
        videos = [sample_video([EVALUATION_STREAM, longest, asked + j], num_frames) for j in range(batch_size)]
        asked += batch_size
        batch = make_batch(processor.tokenizer, videos, [video.questions for video in videos])
        batch = to_device(batch, args.device)
        outputs = model(**model_inputs(batch, processor, augmented=False))
        score.add(exact_answers(outputs.logits, batch), batch["kinds"])
    return score.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("checkpoints/vamba-tiny"), help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=8.0, help="time to train, evaluation not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=32, help="frames of the longest training videos")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to go on from, its weights only")
    parser.add_argument("--frames", type=int, default=32768, help="frames of all videos of a step, at most")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-videos", type=int, help="videos for each range of lengths")
    parser.add_argument("--workers", type=int, help="processes that make up videos and questions")
    parser.add_argument("--log-every", type=int, default=200, help="steps between two lines of progress")
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    args.bf16 = on_gpu
    args.workers = min(12, os.cpu_count() - 1) if args.workers is None else args.workers
    args.eval_videos = args.eval_videos or (512 if on_gpu else 16)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forked
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer)
    if args.resume:
        model = VambaForConditionalGeneration.from_pretrained(args.resume, dtype=torch.float32)
    else:
        model = VambaForConditionalGeneration(make_config(tokenizer))
    model.to(args.device)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=32
    )
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, on {args.device}", flush=True)

    train(model, processor, args)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)

    torch.set_float32_matmul_precision("highest")
    results = {}
    lengths = [SHORTEST, *(args.longest // divisor for divisor in (16, 4, 1) if args.longest // divisor > SHORTEST)]
    for shortest, longest in itertools.pairwise([*lengths, 4 * args.longest]):
        start = time.perf_counter()
        name = f"{shortest} to {longest} frames"
        results[name] = evaluate(model, processor, args, shortest, longest)
        print(f"{name} ({time.perf_counter() - start:.0f} s):", *results[name].items(), flush=True)
    (args.output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
