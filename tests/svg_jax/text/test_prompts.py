"""What families do to prompts, against diffusers' pipelines."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video import (
    pipeline_hunyuan_video,
    pipeline_hunyuan_video_image2video,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from odd_prompts import odd_prompts
from real_tokenizers import real_tokenizer
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from svg_jax.text.prompts import (
    CLIP_LENGTH,
    HUNYUAN_VIDEO_IMAGE_TEMPLATE,
    HUNYUAN_VIDEO_TEMPLATE,
    PromptTemplate,
    clean_prompt,
    hunyuan_video_image_tokens,
    hunyuan_video_tokens,
    wan_tokens,
)
from svg_jax.text.tokenizer import load_tokenizer


def words(count):
    """A prompt of so many tokens."""
    return " ".join(["word"] * count)


PROMPTS = ["", "a cat surfing", "{0} 一只熊猫\n\n", "<pad> x", words(251), words(252)]
LONG = words(300)


@pytest.fixture(scope="module")
def llama3():
    return load_tokenizer(real_tokenizer("llama3"))


@pytest.fixture(scope="module")
def theirs():
    return PreTrainedTokenizerFast.from_pretrained(real_tokenizer("llama3"))


def test_prompts_are_cleaned_as_diffusers_does():
    characters = [f"a{chr(i)}b" for i in range(0x3100) if not 0xD800 <= i < 0xE000]
    entities = [f"&#{i};&amp;#{i};" for i in range(300)]
    for prompt in [*odd_prompts(1500), *characters, *entities]:
        assert clean_prompt(prompt) == prompt_clean(prompt), repr(prompt)


def test_wan_reads_cleaned_prompts_with_a_mask():
    tokenizer = load_tokenizer(real_tokenizer("t5-json"))
    tokens = wan_tokens(tokenizer, ["  Tom &amp;amp; donâ€™t\n", ""])
    assert tokens.ids.shape == tokens.mask.shape == (2, 512)
    np.testing.assert_array_equal(tokens.ids[0], tokenizer(["Tom & don't"], 512)[0])
    np.testing.assert_array_equal(tokens.mask.sum(1), [(tokens.ids[0] != 0).sum(), 1])


def test_templates_are_those_of_diffusers():
    for ours, module in (
        (HUNYUAN_VIDEO_TEMPLATE, pipeline_hunyuan_video),
        (HUNYUAN_VIDEO_IMAGE_TEMPLATE, pipeline_hunyuan_video_image2video),
    ):
        template = module.DEFAULT_PROMPT_TEMPLATE
        assert (ours.text, ours.crop_start) == (template["template"], template["crop_start"])
        assert ours.image_start == template.get("image_emb_start")


class Encoder(torch.nn.Module):
    """Features of a token are what the encoder is told of it: index, id, mask, position."""

    config = SimpleNamespace(image_token_index=128257, pad_token_id=128258)
    dtype = torch.float32

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        nothing = torch.zeros_like(input_ids)
        attention_mask = nothing if attention_mask is None else attention_mask
        position_ids = nothing if position_ids is None else position_ids
        index = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        features = torch.stack([index, input_ids, attention_mask, position_ids], -1)
        return SimpleNamespace(hidden_states=[features.float()] * 3, pooler_output=input_ids)


def pipeline(kind, theirs) -> Any:
    made = kind.__new__(kind)
    made.text_encoder = made.text_encoder_2 = Encoder()
    made.tokenizer = theirs
    made.tokenizer_2 = CLIPTokenizer.from_pretrained(real_tokenizer("clip"))
    made.image_processor = lambda image, return_tensors: SimpleNamespace(pixel_values=image)
    return made


CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_hunyuan_video_reads_what_diffusers_gives_its_encoders(llama3, theirs):
    prompts = [*PROMPTS, LONG]
    made = pipeline(HunyuanVideoPipeline, theirs)
    features, pooled, mask = made.encode_prompt(prompts, **CPU)
    tokens = hunyuan_video_tokens(llama3, prompts)
    start = HUNYUAN_VIDEO_TEMPLATE.crop_start
    np.testing.assert_array_equal(tokens.ids[:, start:], features[..., 1])
    np.testing.assert_array_equal(tokens.mask[:, start:], mask)
    assert tokens.ids.shape == (len(prompts), 351)
    clip = load_tokenizer(real_tokenizer("clip"))
    np.testing.assert_array_equal(clip(prompts, CLIP_LENGTH), pooled)


@pytest.mark.parametrize("prompts", [PROMPTS, *([words(n)] for n in (253, 254, 255, 256, 300))])
@pytest.mark.parametrize("interleave", [2, 4])
def test_llava_reads_what_diffusers_gives_it(prompts, interleave, llama3, theirs):
    made = pipeline(HunyuanVideoImageToVideoPipeline, theirs)
    template = pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE
    image = torch.zeros(len(prompts), 3, 4, 4)
    expected, mask = made._get_llama_prompt_embeds(
        image, prompts, template, image_embed_interleave=interleave, **CPU
    )
    tokens = hunyuan_video_image_tokens(llama3, prompts)
    index = np.broadcast_to(np.arange(tokens.ids.shape[1]), tokens.ids.shape)
    features = np.stack([index, tokens.ids, tokens.mask, tokens.positions], axis=-1)
    text = np.take_along_axis(features, tokens.text[..., None], axis=1)
    ours = np.concatenate([features[:, tokens.image][:, ::interleave], text], axis=1)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(tokens.text_mask, mask[:, -252:])
    assert ours.shape[1] == 576 // interleave + 252


def test_templates_prefixes_are_as_long_as_they_say(llama3):
    for template in (HUNYUAN_VIDEO_TEMPLATE, HUNYUAN_VIDEO_IMAGE_TEMPLATE):
        ids = hunyuan_video_tokens(llama3, ["a", "1"], 8, template).ids
        (differing,) = np.nonzero(ids[0] != ids[1])
        assert differing.tolist() == [template.crop_start]


def test_long_prompts_may_come_in_batches(llama3):
    prompts = [LONG, "a cat", f"<|end_header_id|>{LONG}"]
    together = hunyuan_video_image_tokens(llama3, prompts)
    assert together.text.shape == (3, 252)
    for i, prompt in enumerate(prompts[:2]):
        alone = hunyuan_video_image_tokens(llama3, [prompt])
        for name in ("ids", "mask", "positions", "text", "text_mask"):
            np.testing.assert_array_equal(getattr(together, name)[i], getattr(alone, name)[0])
    assert together.text[2].tolist() == together.text[0].tolist()


def test_what_a_template_pushes_out_is_said(llama3, caplog):
    with caplog.at_level(logging.WARNING, "svg_jax"):
        hunyuan_video_tokens(llama3, ["one two three four"], max_length=3)
    assert "' four<|eot_id|>' was cut off" in caplog.text


def test_an_image_has_as_many_tokens_as_features(llama3):
    tokens = hunyuan_video_image_tokens(llama3, ["a cat"], 32, image_tokens=16)
    (places,) = np.nonzero(tokens.ids[0] == llama3.token_id("<image>"))
    assert places.tolist() == list(range(5, 21)) == list(range(200))[tokens.image]
    assert tokens.ids.shape == (1, 103 + 32 + 15)


def test_bad_prompts_for_llava(llama3):
    with pytest.raises(ValueError, match="a prompt must not hold <image>"):
        hunyuan_video_image_tokens(llama3, ["a cat", "an <image>"])
    with pytest.raises(ValueError, match="a prompt must not hold <image>"):
        hunyuan_video_image_tokens(llama3, ["a"], template=PromptTemplate("{}", 1, image_start=1))
    with pytest.raises(ValueError, match="max_sequence_length must be over 4: got 4"):
        hunyuan_video_image_tokens(llama3, ["a cat"], max_length=4)
    with pytest.raises(ValueError, match="no token '<image>'"):
        hunyuan_video_image_tokens(load_tokenizer(real_tokenizer("clip")), ["a cat"])
