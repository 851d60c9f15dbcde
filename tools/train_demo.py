"""Trains the demo model that ships with llama-router and writes it as GGUF.

The demo lets a first run serve a real chat with nothing downloaded. It is a llama-architecture transformer
of about a million parameters that has read only `demo_text.txt`: it answers questions about llama-router, and
says so when it cannot answer. It is no general language model, and this is no general trainer.

    python tools/train_demo.py            # train, write router/store/demo/demo.gguf, measure it
    python tools/train_demo.py --measure  # only measure the file that is there

The measurement asks the written file, through llama.cpp's own server, the questions that training never saw.
Same seed, same PyTorch, same kind of CPU: same file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import string
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
import xllamacpp
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TEXT_PATH = ROOT / "tools" / "demo_text.txt"
MODEL_PATH = ROOT / "router" / "store" / "demo" / "demo.gguf"

SEED = 7
VOCABULARY = 1536
WIDTH, LAYERS, HEADS, FEED_FORWARD = 128, 4, 4, 384
CONTEXT = 2048
NORM_EPS = 1e-5
ROPE_BASE = 10000.0

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
BOS, EOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))

# Lower case is all the model needs to know of a question. The blank makes the first word of a message the
# same token as inside a sentence.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' + (message['content'] or '') + '<|end|>' -}}
{%- else -%}
{{- '<|system|> ' if message['role'] == 'system' else '<|user|> ' -}}
{{- (message['content'] or '') | trim | lower -}}
{{- '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


# --- the text -----------------------------------------------------------------------------------------------


@dataclass
class Topic:
    name: str
    small_talk: bool  # greetings and the like, which nothing is put before or after
    answer: str = ""
    patterns: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


def bare(question: str) -> str:
    return re.sub(r"\W+", " ", question.lower()).strip()


class Text:
    """The topics, and an endless supply of questions about them."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.rng = rng
        self.macros: dict[str, str] = {}
        self.topics: list[Topic] = []
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "=":
                name, _, self.macros[name] = rest.partition(": ")
            elif kind == "@":
                name, _, note = rest.partition(" ")
                self.topics.append(Topic(name, small_talk=note == "plain"))
            elif kind == "A:":
                self.topics[-1].answer = rest
            elif kind == "Q:":
                self.topics[-1].patterns.append(rest)
            elif kind == "T:":
                self.topics[-1].held_out.append(rest)
            elif kind not in ("", "#"):
                raise ValueError(f"{path}: cannot read {line!r}")
        self.fallback = next(topic for topic in self.topics if topic.name == "fallback")
        self.known = [topic for topic in self.topics if topic is not self.fallback]
        self.unseen = {bare(question) for topic in self.topics for question in topic.held_out}

    def expand(self, pattern: str) -> str:
        """One of the sentences that a pattern stands for."""
        while "(" in pattern or "{" in pattern:
            if "(" in pattern:
                pattern = re.sub(r"\(([^()]*)\)", lambda m: self.rng.choice(m[1].split("|")), pattern)
            else:
                pattern = re.sub(r"\{(\w+)\}", lambda m: self.macro(m[1]), pattern)
        return re.sub(r"  +", " ", pattern).strip()

    def macro(self, name: str) -> str:
        if name == "number":
            return str(self.rng.randint(0, 10 ** self.rng.randint(1, 4)))
        if name == "pseudo":  # a word that nobody knows must lead to the fallback, too
            if self.rng.random() < 0.25:
                return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(2, 8)))
            syllables = self.rng.randint(1, 3)
            return "".join(self.expand("{onset}{vowel}{coda}") for _ in range(syllables))
        return self.macros[name]

    def plain_question(self, topic: Topic) -> str:
        while True:
            question = self.expand(self.rng.choice(topic.patterns))
            if bare(question) not in self.unseen:
                return question

    def question(self, topic: Topic) -> str:
        """A question as people type it: with a please, without a question mark, with a slip of the finger."""
        rng = self.rng
        question = self.plain_question(topic)
        if not topic.small_talk:
            if rng.random() < 0.22:
                question = self.expand("{before}") + " " + question
            if rng.random() < 0.12:
                question += " " * (rng.random() < 0.9) + self.expand("{after}")
        if rng.random() < 0.08:
            question = self.misspell(question)
        if rng.random() < 0.08:
            question = re.sub(r" (a|an|the|do|does|is|are|to|of|my|i) ", " ", question, count=1)
        if rng.random() < 0.3:
            question = question.replace("'", "").replace(" ,", ",")
        return question + rng.choice(["?", "?", "?", "", "", "", ".", "!", "??", " ?", "..."])

    def misspell(self, sentence: str) -> str:
        words = sentence.split(" ")
        at = self.rng.randrange(len(words))
        word = words[at]
        if len(word) > 4:
            i = self.rng.randrange(1, len(word) - 1)
            missing, doubled = word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]
            swapped = word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :]
            words[at] = self.rng.choice([missing, doubled, swapped])
        return " ".join(words)

    def topic(self) -> Topic:
        return self.fallback if self.rng.random() < 0.25 else self.rng.choice(self.known)

    def prose(self, sentences: int) -> str:
        """Text about anything else: long pastes, system prompts, what another model said."""
        separator = self.rng.choice([". ", " ", "\n", ", "])
        return separator.join(self.plain_question(self.fallback) for _ in range(sentences))

    def related(self) -> tuple[str, str]:
        """Two sentences whose embeddings should be close."""
        rng = self.rng
        if rng.random() < 0.6:
            topic = rng.choice(self.known)
            pair = self.question(topic), self.question(topic)
        else:
            kind = rng.choice(["thing", "place", "noun"])
            subject = self.expand("{" + kind + "}")
            patterns = [pattern for pattern in self.fallback.patterns if "{" + kind + "}" in pattern]
            pair = self.about(kind, subject, patterns), self.about(kind, subject, patterns)
        return self.recase(pair[0]), self.recase(pair[1])

    def about(self, kind: str, subject: str, patterns: list[str]) -> str:
        while True:
            sentence = self.expand(self.rng.choice(patterns).replace("{" + kind + "}", subject))
            if subject in sentence:
                return sentence

    def recase(self, sentence: str) -> str:
        return self.rng.choice([sentence, sentence, sentence[:1].upper() + sentence[1:], sentence.upper()])


# --- the vocabulary -----------------------------------------------------------------------------------------


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}


class Vocabulary:
    """Byte-level BPE in the manner of GPT-2, as llama.cpp reads it."""

    # llama.cpp's "gpt-2" pre-tokenizer, in the words of Python's `re`.
    WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

    def __init__(self, corpus: Counter[str], size: int) -> None:
        self.letters = byte_letters()
        counts: Counter[tuple[str, ...]] = Counter()
        for sentence, count in corpus.items():
            for word in self.WORD.findall(sentence):
                counts[self.spell(word)] += count
        self.tokens = SPECIAL + sorted(self.letters.values())
        self.merges: list[tuple[str, str]] = []
        while len(self.tokens) < size:
            pairs: Counter[tuple[str, str]] = Counter()
            for symbols, count in counts.items():
                for pair in itertools.pairwise(symbols):
                    pairs[pair] += count
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            self.merges.append(best)
            self.tokens.append("".join(best))
            merged: Counter[tuple[str, ...]] = Counter()
            for symbols, count in counts.items():
                merged[self.merge(symbols, best)] += count
            counts = merged
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.encode_word = lru_cache(maxsize=200_000)(self.encode_word_uncached)

    def spell(self, word: str) -> tuple[str, ...]:
        return tuple(self.letters[byte] for byte in word.encode())

    @staticmethod
    def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
        if pair[0] not in symbols:
            return symbols
        merged: list[str] = []
        i = 0
        while i < len(symbols):
            if symbols[i : i + 2] == pair:
                merged.append(pair[0] + pair[1])
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        return tuple(merged)

    def encode_word_uncached(self, word: str) -> list[int]:
        symbols = self.spell(word)
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            symbols = self.merge(symbols, best)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, sentence: str) -> list[int]:
        return [token for word in self.WORD.findall(sentence) for token in self.encode_word(word)]


def build_vocabulary(text: Text) -> Vocabulary:
    corpus: Counter[str] = Counter()
    for topic in text.topics:
        corpus[topic.answer] += 100
        for _ in range(1500 if topic is text.fallback else 150):
            question = " " + text.question(topic)
            corpus[question] += 1
    return Vocabulary(corpus, VOCABULARY)


# --- the examples -------------------------------------------------------------------------------------------

Example = tuple[list[int], list[bool]]  # tokens, and which of them the model has to say itself


def conversation(text: Text, vocabulary: Vocabulary, turns: int) -> Example:
    rng = text.rng
    tokens, own = [BOS], [False]

    def add(piece: list[int], *, learn: bool = False) -> None:
        tokens.extend(piece)
        own.extend([learn] * len(piece))

    if rng.random() < 0.05 and turns == 1:  # a bare prompt, without the chat template
        topic = text.topic()
        add(vocabulary.encode(text.recase(text.question(topic))))
        add([*vocabulary.encode("\n" + topic.answer), EOS], learn=True)
        return tokens, own
    if rng.random() < 0.25:
        prompt = text.expand("{system}") + (" " + text.prose(rng.randint(1, 8)) if rng.random() < 0.3 else "")
        add([SYSTEM, *vocabulary.encode(" " + prompt), END])
    for turn in range(turns):
        topic = text.topic()
        question = text.question(topic)
        if topic is text.fallback and rng.random() < 0.08:
            question = text.prose(rng.randint(2, 9))
        add([USER, *vocabulary.encode(" " + question), END, ASSISTANT])
        if turn < turns - 1 and rng.random() < 0.15:  # somebody else's words in the history
            add([*vocabulary.encode(text.prose(rng.randint(1, 4)).capitalize()), END])
        else:
            answer = [*vocabulary.encode(topic.answer), END]
            # The beginning of an answer decides; the rest is soon known by heart and need not always follow.
            add(answer[:12] if turn == turns - 1 and rng.random() < 0.4 else answer, learn=True)
    return tokens, own


@dataclass
class Batch:
    tokens: torch.Tensor
    mask: torch.Tensor  # which token may look at which: backwards, and within its conversation
    at: torch.Tensor  # flat positions that have to predict ...
    target: torch.Tensor  # ... these tokens


def batch(text: Text, vocabulary: Vocabulary, rows: int, length: int) -> Batch:
    tokens = np.full((rows, length), EOS, np.int64)
    owner = np.full((rows, length), -1, np.int64)
    at: list[int] = []
    target: list[int] = []
    for row in range(rows):
        start = serial = 0
        while length - start > 40:
            most = 24 if length > 512 else 4
            turns = 1 if text.rng.random() < 0.65 else text.rng.randint(2, most)
            ids, own = conversation(text, vocabulary, turns)
            if len(ids) > length - start:
                ids, own = ids[: length - start], own[: length - start]
            tokens[row, start : start + len(ids)] = ids
            owner[row, start : start + len(ids)] = serial
            for i in range(1, len(ids)):
                if own[i]:
                    at.append(row * length + start + i - 1)
                    target.append(ids[i])
            start += len(ids)
            serial += 1
    same = torch.from_numpy(owner)[:, :, None] == torch.from_numpy(owner)[:, None, :]
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    return Batch(torch.from_numpy(tokens), mask, torch.tensor(at), torch.tensor(target))


def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences side by side, and which tokens are real. A causal model never sees the padding behind."""
    length = max(map(len, sequences))
    tokens = torch.tensor([ids + [EOS] * (length - len(ids)) for ids in sequences])
    real = torch.tensor([[True] * len(ids) + [False] * (length - len(ids)) for ids in sequences])
    return tokens, real


# --- the model ----------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions on neighbouring pairs, as llama.cpp does it for this architecture."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH, NORM_EPS)
        self.attn_q, self.attn_k, self.attn_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.attn_output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_norm = nn.RMSNorm(WIDTH, NORM_EPS)
        self.ffn_gate, self.ffn_up = (nn.Linear(WIDTH, FEED_FORWARD, bias=False) for _ in range(2))
        self.ffn_down = nn.Linear(FEED_FORWARD, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows, length, _ = x.shape
        h = self.attn_norm(x)
        states = self.attn_q(h), self.attn_k(h), self.attn_v(h)
        q, k, v = (state.view(rows, length, HEADS, -1).transpose(1, 2) for state in states)
        q, k = rotate(q, angles), rotate(k, angles)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.attn_output(a.transpose(1, 2).reshape(rows, length, WIDTH))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(VOCABULARY, WIDTH)
        self.blk = nn.ModuleList(Block() for _ in range(LAYERS))
        self.output_norm = nn.RMSNorm(WIDTH, NORM_EPS)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.05 / math.sqrt(2 * LAYERS) if into_stream else 0.05)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        half = WIDTH // HEADS // 2
        frequencies = ROPE_BASE ** (-torch.arange(half) / half)
        angles = torch.arange(tokens.shape[1])[:, None] * frequencies
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, angles, mask)
        return self.output_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.token_embd.weight.T  # input and output share their embedding


def sentence_loss(model: Llama, text: Text, vocabulary: Vocabulary, pairs: int) -> torch.Tensor:
    """Pulls the mean-pooled states of related sentences together and those of unrelated ones apart."""
    sentences = [list(side) for side in zip(*(text.related() for _ in range(pairs)), strict=True)]
    tokens, real = padded([[BOS, *vocabulary.encode(sentence)] for side in sentences for sentence in side])
    pooled = (model(tokens) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    left, right = F.normalize(pooled, dim=-1).chunk(2)
    return F.cross_entropy(left @ right.T / 0.1, torch.arange(pairs))


@torch.no_grad()
def held_out_accuracy(model: Llama, text: Text, vocabulary: Vocabulary) -> float:
    """The share of held-out questions whose answer would come word for word: each token the likeliest one."""
    asked = [(topic, question) for topic in text.topics for question in topic.held_out]
    prompts = [[BOS, USER, *vocabulary.encode(" " + question), END, ASSISTANT] for _, question in asked]
    answers = [[*vocabulary.encode(topic.answer), END] for topic, _ in asked]
    tokens, _ = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    said = model.logits(model(tokens)).argmax(-1)
    right = (
        said[row, len(prompts[row]) - 1 :][: len(answer)].tolist() == answer for row, answer in enumerate(answers)
    )
    return sum(right) / len(asked)


def train(text: Text, vocabulary: Vocabulary, steps: int) -> Llama:
    model = Llama()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text.topics)} topics")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    started = time.process_time()
    for step in range(1, steps + 1):
        rate = 4e-3 * min(1, step / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Now and then a long conversation, so that the model knows what many tokens of history look like.
        lesson = batch(text, vocabulary, 3, 1024) if step % 12 == 0 else batch(text, vocabulary, 12, 256)
        hidden = model(lesson.tokens, lesson.mask).flatten(0, 1)[lesson.at]
        loss = F.cross_entropy(model.logits(hidden), lesson.target)
        total = loss + 0.3 * sentence_loss(model, text, vocabulary, 48) if step % 5 == 0 else loss
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            right, seconds = held_out_accuracy(model, text, vocabulary), time.process_time() - started
            print(f"step {step:5d} {seconds:5.0f} s  loss {loss.item():.4f}  held out {right:.1%}", flush=True)
    return model


# --- the file -----------------------------------------------------------------------------------------------


def write(model: Llama, vocabulary: Vocabulary, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("llama-router demo")
    writer.add_description(
        "A tiny model that answers questions about llama-router: a first run needs no download."
    )
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_vocab_size(VOCABULARY)
    writer.add_sampling_temp(0.0)  # it knows its answers by heart: chance would only spoil them
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    control = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(control + [gguf.TokenType.NORMAL] * (len(vocabulary.tokens) - len(SPECIAL)))
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END)
    writer.add_pad_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        writer.add_tensor(name, values.astype(np.float16) if values.ndim == 2 else values)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path}: {path.stat().st_size:,} bytes")


# --- the measurement ----------------------------------------------------------------------------------------


class Engine:
    """llama.cpp's server in this process, on the file that was written."""

    def __init__(self, path: Path, *, embedding: bool = False) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.port = 0
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.verbosity = 0
        params.embedding = embedding
        if embedding:
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        self.server = xllamacpp.Server(params)

    def post(self, route: str, body: dict[str, object]) -> dict:
        url, header = self.server.listening_address + route, {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), header)) as response:
            return json.load(response)

    def chat(self, *messages: tuple[str, str]) -> str:
        spelt = [{"role": role, "content": content} for role, content in messages]
        body: dict[str, object] = {"messages": spelt, "temperature": 0, "max_tokens": 120}
        choice = self.post("/v1/chat/completions", body)["choices"][0]
        return choice["message"]["content"] if choice["finish_reason"] == "stop" else "(does not stop)"

    def embed(self, sentences: list[str]) -> np.ndarray:
        rows = self.post("/v1/embeddings", {"input": sentences})["data"]
        return np.array([row["embedding"] for row in rows])


def spellings(question: str) -> Iterator[str]:
    yield question
    yield question.rstrip("?!.")
    yield question[:1].upper() + question[1:]
    yield question.upper() + "!"


def measure_answers(text: Text, path: Path) -> None:
    engine = Engine(path)
    greeting, fallback = ("assistant", text.known[0].answer), ("assistant", text.fallback.answer)
    settings: dict[str, list[tuple[str, str]]] = {
        "alone, in four spellings each": [],
        "after a system prompt": [("system", "You are a careful assistant for our team.")],
        "as third question": [
            ("user", "Hello!"),
            greeting,
            ("user", "What is the capital of Chile?"),
            fallback,
        ],
    }
    print("\nheld-out questions, answered word for word:")
    for setting, before in settings.items():
        score: Counter[tuple[bool, bool]] = Counter()
        for topic in text.topics:
            for question in topic.held_out:
                for spelling in [question] if before else spellings(question):
                    answer = engine.chat(*before, ("user", spelling))
                    score[topic is text.fallback, answer == topic.answer] += 1
                    if answer != topic.answer and spelling == question:
                        print(f"    {topic.name}: {question!r} -> {answer!r}")
        for unknown, subject in (False, "llama-router"), (True, "anything else"):
            right, asked = score[unknown, True], score[unknown, True] + score[unknown, False]
            print(f"  {setting}, about {subject}: {right}/{asked} = {right / asked:.1%}")


def measure_embeddings(text: Text, path: Path) -> None:
    owners = [topic.name for topic in text.known for _ in topic.held_out]
    vectors = Engine(path, embedding=True).embed([q for topic in text.known for q in topic.held_out])
    similarity = vectors @ vectors.T  # llama.cpp normalises
    same = np.equal.outer(owners, owners)
    itself = np.eye(len(owners), dtype=bool)
    nearest = np.where(itself, -1, similarity).argmax(1)
    found = np.mean([owners[i] == owners[j] for i, j in enumerate(nearest)])
    print("\nembeddings of held-out questions about llama-router:")
    within, across = similarity[same & ~itself].mean(), similarity[~same].mean()
    print(f"  mean cosine within a topic {within:.2f}, across topics {across:.2f}")
    print(f"  the nearest other question is of the same topic: {found:.1%}")


def check_tokens(text: Text, vocabulary: Vocabulary, path: Path) -> None:
    """llama.cpp must cut the text as training did."""
    engine = Engine(path)
    sentences = [" " + question for topic in text.topics for question in topic.held_out]
    sentences += [topic.answer for topic in text.topics]
    sentences += [text.question(text.topic()) for _ in range(300)]
    sentences += ["", " ", "a\n\n b\t c  ", "naïve café — 日本語 🦙 it's you've 12.5% x_y __init__"]
    for sentence in sentences:
        ours, theirs = vocabulary.encode(sentence), engine.post("/tokenize", {"content": sentence})["tokens"]
        if ours != theirs:
            raise SystemExit(f"{sentence!r} is {ours} in training, but {theirs} in llama.cpp")
    print(f"llama.cpp cuts {len(sentences)} sentences into the same tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the demo model of llama-router.")
    parser.add_argument("--measure", action="store_true", help="only measure the model that is there")
    parser.add_argument("--steps", type=int, default=1400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=MODEL_PATH, help="the GGUF (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fixed order of sums: the same file every time
    torch.manual_seed(SEED)
    text = Text(TEXT_PATH, random.Random(SEED))
    if not arguments.measure:
        vocabulary = build_vocabulary(text)
        model = train(text, vocabulary, arguments.steps)
        write(model, vocabulary, arguments.output)
        check_tokens(text, vocabulary, arguments.output)
    measure_answers(text, arguments.output)
    measure_embeddings(text, arguments.output)


if __name__ == "__main__":
    main()
