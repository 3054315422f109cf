"""Prompts that tokenizers could disagree on: a fixed list, drawn from fixed pools."""

import random

WORDS = ["a", "red", "panda", "surfing", "Cinematic", "4K", "shot,", "of", "an", "OLD", "house"]
WORDS += ["dawn;", "waves'", "crash", "don't", "it's", "we'll", "I'VE", "hello-world", "café"]
WORDS += ["naïve", "résumé", "Ångström"]
CHINESE = list("一只熊猫在海浪上冲浪电影感镜头夕阳下的城市，。！？：“”《》")
EMOJI = ["🐼", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "👍🏽", "❤️", "☃️", "🤷🏿‍♂️"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u00ad", "\u180e"]
SPACES += ["\u2003", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff"]
SPECIAL = ["</s>", "<pad>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_3>", "<extra_id_99>"]
SPECIAL += ["<extra_id_100>", "<EXTRA_ID_3>", "<mask>", "▁", "<|startoftext|>", "<|STARTOFTEXT|>"]
SPECIAL += ["<|endoftext|>", "<|EndOfText|>", "<|begin_of_text|>", "<|eot_id|>", "<image>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_0|>"]
SCRIPTS = ["ﬁ", "①", "½", "Ⅷ", "e\u0301", "A\u030a", "K", "Å", "\u0344", "한국어", "ｶﾀｶﾅ", "ไทย"]
SCRIPTS += ["हिन्दी में", "日本語ひらがな", "العربية", "עברית", "Ελληνικά", "Русский", "İstanbul"]
SCRIPTS += ["ǅ", "ß", "\u0e33", "\u1100\u1161\u11a8", "\x00", "\x07", "\ud7ff"]
SCRIPTS += ["\U0001f9ff", "\U00020000"]
ASCII = ["1234567890", "12,345.67", "&amp;", "&amp;lt;b&gt;", "“quoted”", "…", "—", "--"]
ASCII += ["__init__", "C++", "\\n", "%20", "{}", "{0}", "<html>", "l'été", "cafÃ©", "donâ€™t"]
ASCII += ["!!!", "@#$%^&*()"]


def odd_prompts(count: int) -> list[str]:
    """Each odd thing alone, between words and inside one; then random mixtures, `count` in all."""
    odd = [*EMOJI, *SPACES, *SPECIAL, *SCRIPTS, *ASCII]
    prompts = [""] + [form.format(x) for form in ("{}", "a {} b", "a{}b", "{}{{}}") for x in odd]
    prompts += [f"a  {token} \n{token}{token} b " for token in SPECIAL]
    draw = random.Random(0)
    pools = [WORDS, CHINESE, EMOJI, SPACES, SPECIAL, SCRIPTS + ASCII]
    while len(prompts) < count:
        chosen = draw.choices(pools, [6, 2, 1, 2, 1, 2], k=draw.randint(1, 30))
        prompts.append(draw.choice(["", " "]).join(draw.choice(pool) for pool in chosen))
    return prompts[:count]
