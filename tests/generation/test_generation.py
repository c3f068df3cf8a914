# SPDX-License-Identifier: Apache-2.0
"""`generate` with a video in the cache: one copy of it, whoever reads it, in every mode."""

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_vamba import cache_of, make_media, make_text, tiny_model
from transformers import CompileConfig, DynamicCache, StaticCache

from transformers_vamba import VambaCache


VIDEO = make_media("video", (5, 4, 6))
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, text, **kwargs):
    return model.generate(input_ids=text, max_new_tokens=NEW_TOKENS, **{"do_sample": False, **kwargs})


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens about the video, by whole forward passes without any cache."""
    tokens = make_text()
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=tokens, use_cache=False, **VIDEO).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "one beam of one": {"num_return_sequences": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "top-k of one": {"do_sample": True, "top_k": 1},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", ("pixels", "encoded"))
def test_modes_agree(model, expected, mode, given):
    media = VIDEO if given == "pixels" else {"cache": model.encode_video(**VIDEO)}
    assert torch.equal(generate(model, make_text(), **media, **MODES[mode]), expected)


def test_static_cache_compiles(model, expected):
    """One graph without a break, as CUDA graphs ask for, with the video in the cache."""
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend="aot_eager")
    compile_config._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": compile_config, "return_dict_in_generate": True}
    output = generate(model, make_text(), **kwargs, **VIDEO)
    assert hasattr(model, "_compiled_call") and torch.equal(output.sequences, expected)
    assert isinstance(cache_of(output), StaticCache) and isinstance(cache_of(output), VambaCache)
    assert isinstance(copy.deepcopy(cache_of(output)), StaticCache)


def test_assisted_generation(model, expected):
    assistant = tiny_model()
    assert torch.equal(generate(model, make_text(), assistant_model=assistant, **VIDEO), expected)


def test_offloaded_options_reach_the_text(model, expected):
    """Any cache for text can be given; its layers are taken over."""
    text_cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(generate(model, make_text(), cache=text_cache, **VIDEO), expected)
    assert text_cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("copies", ({"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}))
def test_beams_agree_with_separate_copies(model, copies):
    """Beam search gives what it gives where every row of the batch brings its own copy of the video."""
    text = make_text()
    shared = generate(model, text, output_scores=True, return_dict_in_generate=True, **copies, **VIDEO)
    twice = {name: torch.cat([value, value]) for name, value in VIDEO.items()}
    separate = generate(model, text.repeat(2, 1), output_scores=True, return_dict_in_generate=True, **copies, **twice)
    count = len(shared.sequences)
    assert torch.equal(separate.sequences[:count], shared.sequences)
    assert torch.equal(separate.sequences[count:], shared.sequences)
    torch.testing.assert_close(separate.sequences_scores[:count], shared.sequences_scores)


def test_samples_differ_and_share(model):
    torch.manual_seed(0)
    output = generate(
        model, make_text(), do_sample=True, num_return_sequences=6, return_dict_in_generate=True, **VIDEO
    )
    assert len({tuple(tokens.tolist()) for tokens in output.sequences}) > 1
    assert cache_of(output).rows == [0] * 6 and len(cache_of(output).videos) == 1


@pytest.mark.parametrize("num_beams", (1, 8))
def test_video_takes_the_same_memory_for_any_number_of_beams(model, num_beams):
    output = generate(model, make_text(), num_beams=num_beams, return_dict_in_generate=True, **VIDEO)
    cache = cache_of(output)
    storages = [states.untyped_storage() for layer in cache.videos[0] for states in (layer.keys, layer.values)]
    storages = {storage.data_ptr(): storage for storage in storages}
    tokens = cache.video_lengths[0]
    assert len(cache.videos) == 1 and tokens == 30
    assert sum(storage.nbytes() for storage in storages.values()) == 3 * 2 * 2 * tokens * 16 * 4
    assert cache.layers[0].keys.shape[0] == num_beams


def test_many_questions_about_one_video(model):
    cache = model.encode_video(**VIDEO)
    questions = make_text(3, seed=7)
    answers = generate(model, questions, cache=cache.fork())
    for question, answer in zip(questions, answers):
        assert torch.equal(generate(model, question[None], cache=cache.fork())[0], answer)
        assert torch.equal(generate(model, question[None], **VIDEO)[0], answer)
    assert cache.get_seq_length() == 0 and cache.rows is None


def test_rows_read_their_own_video(model):
    videos = [make_media("video", (t, 4, 4), seed=t) for t in (2, 3)]
    batch = {name: torch.cat([video[name] for video in videos]) for name in videos[0]}
    cache = model.encode_video(**batch, video_sample_ids=torch.tensor([0, 1]))
    assert cache.video_lengths == [8, 12]
    text = make_text(2)
    answers = generate(model, text, cache=cache.fork())
    for row, video in enumerate(videos):
        assert torch.equal(generate(model, text[row : row + 1], **video)[0], answers[row])

    # Rows may also be told apart by hand: both read the second video.
    fork = cache.fork()
    fork.rows = [1, 1]
    answers = generate(model, text, cache=fork)
    assert torch.equal(generate(model, text[:1], **videos[1])[0], answers[0])

    for rows in ([2, 0], [-1, None]):
        fork.rows = rows
        with pytest.raises(ValueError, match="`cache.rows` is .*, but the cache holds 2 videos"):
            model(input_ids=text, cache=fork)

    with pytest.raises(ValueError, match="holds 2 videos and is read by 3 rows"):
        generate(model, make_text(3), cache=cache.fork())


def test_fork_and_stream(model):
    """What is appended to a cache is not seen by a fork, and what a fork appends is not seen by the cache."""
    first, second = (make_media("video", (3, 4, 4), seed=seed) for seed in (1, 5))
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    text = make_text()
    answers = [generate(model, text, **video) for video in (first, both)]
    assert not torch.equal(*answers)

    cache = model.encode_video(**first)
    early = cache.fork()
    storage = cache.videos[0][0].keys.untyped_storage().data_ptr()
    assert early.videos[0][0].keys.untyped_storage().data_ptr() == storage  # not a byte is copied
    cache = model.encode_video(**second, cache=cache)
    late = cache.fork()
    assert torch.equal(generate(model, text, cache=early.fork()), answers[0])
    early = model.encode_video(**second, cache=early)
    assert torch.equal(generate(model, text, cache=early), answers[1])
    assert torch.equal(generate(model, text, cache=late), answers[1])
    assert torch.equal(generate(model, text, cache=cache), answers[1])


def test_fork_in_the_middle_of_a_conversation(model):
    """A fork goes on from the text read so far, without changing it."""
    cache = model.encode_video(**VIDEO)
    turn = generate(model, make_text(), cache=cache)
    follow_ups = [torch.cat([turn, make_text(seed=seed)], dim=1) for seed in (3, 4)]
    length = cache.get_seq_length()
    for follow_up in follow_ups:
        answer = generate(model, follow_up, cache=cache.fork())
        assert torch.equal(answer, generate(model, follow_up, **VIDEO))
    assert cache.get_seq_length() == length


def test_continue_from_a_given_cache(model):
    text = make_text()
    whole = model.generate(input_ids=text, max_new_tokens=NEW_TOKENS, do_sample=False, **VIDEO)
    first = model.generate(input_ids=text, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **VIDEO)
    rest = model.generate(
        input_ids=first.sequences,
        cache=cache_of(first),
        max_new_tokens=NEW_TOKENS - 3,
        do_sample=False,
    )
    assert torch.equal(rest, whole)


def test_media_of_earlier_turns_are_not_encoded_again(model):
    """The whole conversation is the prompt of each turn, with all its media: the cache takes what is new."""
    first, second = (make_media("video", (2, 4, 4), seed=seed) for seed in (1, 5))
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    text = make_text()
    marks = torch.zeros_like(text)
    marks[0, 2] = 2
    turn = generate(model, text, mm_token_type_ids=marks, return_dict_in_generate=True, **first)
    cache = cache_of(turn)
    text = torch.cat([turn.sequences, make_text(seed=3)], dim=1)
    marks = torch.cat([marks, torch.zeros(1, text.shape[1] - marks.shape[1], dtype=torch.long)], dim=1)
    fork = cache.fork()
    answer = generate(model, text, mm_token_type_ids=marks, cache=fork, **first)
    assert fork.video_lengths == [8] and torch.equal(answer, generate(model, text, **first))

    later = marks.clone()
    later[0, -3] = 2
    mask = torch.ones_like(text)
    # The whole conversation, or its new tokens beside the mask of all.
    for start, media in ((0, both), (cache.get_seq_length(), second)):
        fork = cache.fork()
        inputs = {"mm_token_type_ids": later[:, start:], "attention_mask": mask, **media}
        generate(model, text[:, start:], cache=fork, **inputs)
        torch.testing.assert_close(fork.videos[0][0].keys, model.encode_video(**both).videos[0][0].keys)


def test_prompt_that_does_not_go_on(model):
    """A second question to a cache that holds the first one, where a fork was forgotten."""
    cache = model.encode_video(**VIDEO)
    generate(model, make_text(), cache=cache)
    with pytest.raises(ValueError, match=r"holds 19 tokens of text.* longer; got one of 12\..*cache\.fork\(\)"):
        generate(model, make_text(seed=1), cache=cache)


def test_no_cache_is_returned_unless_asked_for(model):
    with torch.no_grad():
        assert cache_of(model(input_ids=make_text(), use_cache=False, **VIDEO)) is None
        assert cache_of(model(input_ids=make_text(), **VIDEO)).video_lengths == [30]
    assert cache_of(model.train()(input_ids=make_text(), **VIDEO)) is None
    model.eval()


def test_media_join_the_row_of_a_cache(model):
    """Pixels given together with a cache go behind what the row has seen; a video that rows share stays as it is."""
    first, second = (make_media("video", (2, 4, 4), seed=seed) for seed in (1, 5))
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    cache = model.encode_video(**first)
    answer = generate(model, make_text(), cache=cache.fork(), **second)
    assert torch.equal(answer, generate(model, make_text(), **both))
    with pytest.raises(ValueError, match="shares its video"):
        generate(model, make_text(2), cache=cache.fork(), video_sample_ids=torch.tensor([1]), **second)


def test_append_to_one_of_several_videos(model):
    both, rows = make_media("video", (2, 4, 4), (3, 4, 4)), torch.tensor([0, 1])
    more = make_media("video", (1, 4, 4), seed=3)
    cache = model.encode_video(**both, video_sample_ids=rows)
    for row in (1, 0, 1):
        model.encode_video(**more, video_sample_ids=torch.tensor([row]), cache=cache)
    assert cache.video_lengths == [12, 20] and cache.rows is None
    whole = model.encode_video(**both, video_sample_ids=rows)
    twice = {name: torch.cat([more[name], more[name]]) for name in more}
    model.encode_video(**twice, video_sample_ids=rows, cache=whole)
    assert torch.allclose(cache.videos[0][2].keys, whole.videos[0][2].keys, atol=1e-5)
    with pytest.raises(ValueError, match="describes 1 media for 2 rows: say with `video_sample_ids`"):
        model.encode_video(**more, cache=cache)
    assert cache.video_lengths == [12, 20]


def test_cache_operations(model):
    cache = VambaCache(model.config)
    with torch.no_grad():
        model(input_ids=make_text(2), cache=cache, **make_media("video", (1, 4, 4), (2, 4, 4)))
    assert cache.get_seq_length() == 12 and cache.rows == [0, 1] and cache.video_lengths == [4, 8]

    cache.crop(-5)
    assert cache.get_seq_length() == 7 and cache.video_lengths == [4, 8]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.rows == [1, 0]
    cache.batch_repeat_interleave(2)
    assert cache.rows == [1, 1, 0, 0] and cache.layers[0].keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.rows == [1, 0] and cache.layers[0].keys.shape[0] == 2
    copied = copy.deepcopy(cache)
    with torch.no_grad():
        same = [model(input_ids=make_text(2), cache=each).logits for each in (cache, copied)]
    assert torch.equal(*same)
    with pytest.raises(ValueError, match="filled by 2 rows and is now read by 3"):
        model(input_ids=make_text(3), cache=cache)
    cache.reset()
    assert cache.videos == [] and cache.rows is None


def test_storage_is_sized_ahead(model):
    """A video of known length is written into storage of exactly its size; a stream grows it by more than it needs."""
    cache = model.encode_video(**VIDEO, segment_frames=2)
    layer = cache.videos[0][0]
    assert layer._storage._memory[0].shape[-2] == layer.get_seq_length() == 30
    pointers = set()
    for _ in range(40):
        model.encode_video(**make_media("video", (1, 4, 4)), cache=cache)
        pointers.add(layer._storage._memory[0].data_ptr())
    assert layer.get_seq_length() == 190 and len(pointers) < 40  # not at every append
    assert layer._storage._memory[0].shape[-2] <= 190 * 17 / 16


def test_save_and_load(model, tmp_path):
    """A processed video from a folder: asked, forked and appended to as if it had never left."""
    more = make_media("video", (2, 4, 6), seed=9)
    cache = model.encode_video(**VIDEO)
    generate(model, make_text(), cache=cache)  # the text read is not kept
    cache.save_pretrained(tmp_path / "movie")
    loaded = VambaCache.from_pretrained(tmp_path / "movie")
    assert loaded.video_lengths == [30] and loaded.get_seq_length() == 0 and loaded.rows is None
    assert torch.equal(
        generate(model, make_text(2), cache=loaded.fork())[:1],
        generate(model, make_text(2), cache=model.encode_video(**VIDEO))[:1],
    )
    expected = model.encode_video(**more, cache=model.encode_video(**VIDEO))
    model.encode_video(**more, cache=loaded)
    assert torch.equal(loaded.videos[0][2].keys, expected.videos[0][2].keys)

    two = make_media("video", (1, 4, 4), (2, 4, 4))
    model.encode_video(**two, video_sample_ids=torch.tensor([0, 2])).save_pretrained(tmp_path / "rows")
    assert VambaCache.from_pretrained(tmp_path / "rows").rows == [0, None, 1]


def test_saving_that_fails_keeps_what_was_saved(model, tmp_path, monkeypatch):
    """A full disk, on the second of the layers."""
    cache = model.encode_video(**VIDEO)
    cache.save_pretrained(tmp_path)
    model.encode_video(**VIDEO, cache=cache)
    names = sorted(os.listdir(tmp_path))

    def save_on_a_full_disk(tensors, path, metadata):
        if Path(path).name == "layer-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("transformers_vamba.cache.saving.save_file", save_on_a_full_disk)
        with pytest.raises(OSError, match="No space"):
            cache.save_pretrained(tmp_path)
    loaded = VambaCache.from_pretrained(tmp_path)
    assert [layer.get_seq_length() for layer in loaded.videos[0]] == [30] * 3 and sorted(os.listdir(tmp_path)) == names

    # A video that is read from the folder goes back there, longer.
    model.encode_video(**VIDEO, cache=loaded)
    loaded.save_pretrained(tmp_path)
    again = VambaCache.from_pretrained(tmp_path)
    assert all(torch.equal(new.keys, old.keys) for new, old in zip(again.videos[0], cache.videos[0]))
    assert sorted(os.listdir(tmp_path)) == names


def test_load_errors(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="cache_config.json"):
        VambaCache.from_pretrained(tmp_path)
    model.encode_video(**VIDEO).save_pretrained(tmp_path)
    other = tiny_model(mamba_d_state=32)
    with pytest.raises(ValueError, match="of another model: it has mamba_d_state 16 instead of 32"):
        generate(other, make_text(), cache=VambaCache.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="of another model"):
        other.encode_video(**VIDEO, cache=VambaCache.from_pretrained(tmp_path))
    path = tmp_path / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged.*layer-00001"):
        VambaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("segment_frames", (0, -2))
def test_bad_segment(model, segment_frames):
    with pytest.raises(ValueError, match=f"at least 1, got {segment_frames}"):
        model.encode_video(**VIDEO, segment_frames=segment_frames)


@pytest.mark.gpu
def test_cache_moves_between_devices(model):
    moved = model.to("cuda")
    expected = generate(moved, make_text().cuda(), **VIDEO)
    cache = moved.encode_video(**VIDEO).to("cpu")
    assert {layer.keys.device.type for layer in cache.videos[0]} == {"cpu"}
    assert torch.equal(generate(moved, make_text().cuda(), cache=cache.to("cuda")), expected)
    model.to("cpu")


@pytest.mark.parametrize("given", ("pixels", "cache", "nothing"))
def test_training_mode_with_gradient_checkpointing(given):
    """As a callback of a trainer generates, in the middle of training."""
    model = tiny_model()
    inputs = {"pixels": VIDEO, "cache": {"cache": model.encode_video(**VIDEO)}, "nothing": {}}[given]
    fork = {"cache": inputs["cache"].fork()} if given == "cache" else inputs
    expected = generate(model, make_text(), **fork)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert torch.equal(generate(model, make_text(), **inputs), expected)
    assert all(module.gradient_checkpointing for module in checkpointed) and checkpointed and model.training


@pytest.mark.parametrize("cache_implementation", (None, "static"))
@pytest.mark.parametrize("length", (8, 12, 17, 30))
def test_a_forgotten_fork_is_an_error(model, length, cache_implementation):
    """Whatever the second question's length: the tokens are compared."""
    cache = model.encode_video(**VIDEO)
    options = {"return_dict_in_generate": True, "cache_implementation": cache_implementation}
    cache = cache_of(generate(model, make_text(), cache=cache, **options))
    with pytest.raises(ValueError, match="go(es)? on from .*fork"):
        generate(model, make_text(length=length, seed=1), cache=cache)


def test_a_forgotten_fork_is_an_error_after_an_answer_that_was_broken_off(model):
    class BreaksOff:
        def put(self, value):
            if value.numel() == 1:
                raise KeyboardInterrupt

    cache = model.encode_video(**VIDEO)
    with pytest.raises(KeyboardInterrupt):
        generate(model, make_text(), cache=cache, streamer=BreaksOff())
    with pytest.raises(ValueError, match="go(es)? on from .*fork"):
        generate(model, make_text(length=20, seed=1), cache=cache)


@pytest.mark.parametrize("given", ("pixels", "cache"))
def test_without_use_cache_none_is_returned(model, given):
    inputs = VIDEO if given == "pixels" else {"cache": model.encode_video(**VIDEO)}
    expected = generate(model, make_text(), **VIDEO)
    outputs = generate(model, make_text(), use_cache=False, return_dict_in_generate=True, **inputs)
    assert cache_of(outputs) is None and "cache" not in outputs and "past_key_values" not in outputs
    assert torch.equal(outputs.sequences, expected)


@pytest.mark.parametrize("kind", ("image", "video"))
def test_a_conversation_goes_on_with_grids_whose_pixels_are_gone(model, kind):
    """As Transformers' own tests continue from a cache."""
    media = make_media(kind, (1, 4, 6) if kind == "image" else (5, 4, 6))
    expected = generate(model, make_text(), **media)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(make_text(), **options, **media)
    grids = {name: value for name, value in media.items() if name.endswith("grid_thw")}
    outputs = model.generate(
        first.sequences, cache=cache_of(first), max_new_tokens=expected.shape[1] - 15, do_sample=False, **grids
    )
    assert torch.equal(outputs, expected)
    with pytest.raises(ValueError, match="grid_thw` was given without"):
        generate(model, make_text(), **grids)
