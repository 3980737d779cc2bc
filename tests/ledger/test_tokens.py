"""With which weight tokens enter the loss of real models, told from a run alone: what is wrong in which micro-batch."""

from __future__ import annotations

import pytest
import torch
import transformers

import trainfix
from trainfix.proofs.token_experiment import IGNORED, VOCABULARY, tiny_llama

LENGTHS = (2, 9, 5, 30)  # trained tokens of each micro-batch's sequences
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0}

MODELS = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "Llama, tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "Gemma 2, logits capped": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 0.3},
    ),
    "Granite, logits divided": (transformers.GraniteForCausalLM, transformers.GraniteConfig, {"logits_scaling": 8.0}),
    "Cohere, logits multiplied": (transformers.CohereForCausalLM, transformers.CohereConfig, {"logit_scale": 0.0625}),
    "Qwen 3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 8}),
    "GPT-2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    ),
}


def build(name="Llama"):
    kind, config, changes = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**SIZES | changes))


def batch(number, *, rows=2, prompt=4, left=False, length=None):
    """Two sequences with `LENGTHS` trained tokens, padded."""
    generator = torch.Generator().manual_seed(number)
    answers = [LENGTHS[number % len(LENGTHS)] if length is None else length] * rows
    answers[-1] += 3
    longest = prompt + max(answers)
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        begin = longest - prompt - answer if left else 0
        text = torch.randint(3, VOCABULARY, (prompt + answer,), generator=generator)
        ids[row, begin : begin + len(text)] = text
        mask[row, begin : begin + len(text)] = 1
        labels[row, begin + prompt : begin + len(text)] = text[prompt:]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def count(one):
    return int((one["labels"][:, 1:] != IGNORED).sum())


def right(model, one, total):
    return model(**one, num_items_in_batch=total).loss


def audited(loss=right, *, model=None, windows=2, change=None, batches=None, dtype=None, **how):
    """The verdicts on windows of four micro-batches. loss: (model, micro-batch, tokens of the window) -> loss."""
    model = build() if model is None else model
    model = model.to(dtype) if dtype else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with trainfix.ledger(model, optimizer) as verdicts:
        for window in range(windows):
            ones = batches or [batch(4 * window + number, **how) for number in range(4)]
            total = torch.tensor(sum(count(one) for one in ones))
            for one in ones:
                loss(model, change(one) if change else one, total).backward()
            optimizer.step()
            optimizer.zero_grad()
    return list(verdicts)


def weights(verdict):
    return list(verdict.tokens.weights.values())


@pytest.mark.parametrize("name", MODELS)
def test_tokens_with_equal_weight_are_even_in_real_models(name):
    for one in audited(model=build(name)):
        assert one.state == "balanced", one.line()
        assert one.tokens.verdict == "even"
        assert weights(one) == pytest.approx([1] * 4, abs=1e-3)
        assert one.scale == 1.0
        assert one.line().endswith("tokens with equal weight")


def test_every_trained_token_is_counted_and_its_loss_is_the_models():
    ones = [batch(number) for number in range(4)]
    model = build()
    wanted = [float(model(**one).loss) for one in ones]
    found = audited(model=model, windows=1, batches=ones)[0].tokens
    assert list(found.tokens.values()) == [count(one) for one in ones]
    assert list(found.losses.values()) == pytest.approx(wanted, rel=1e-4)


def test_the_mean_of_the_micro_batches_means_is_named_with_both_ends():
    for one in audited(lambda model, one, total: model(**one).loss / 4):
        assert one.state == "not balanced"
        (problem,) = one.problems
        assert "tokens count up to 9 times as much as others: those of micro-batch 1 (7 tokens)" in problem
        each = [1 / tokens for tokens in one.tokens.tokens.values()]
        assert weights(one) == pytest.approx([value / each[0] * weights(one)[0] for value in each], rel=1e-3)


def test_sequences_that_count_differently_inside_a_micro_batch_are_named():
    def loss(model, one, total):
        logits = model(**{key: one[key] for key in ("input_ids", "attention_mask")}).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), one["labels"][:, 1:], reduction="none")
        return (each.sum(1) / (one["labels"][:, 1:] != IGNORED).sum(1)).mean() / 4

    for one in audited(loss):
        assert one.state == "not balanced"
        assert "inside micro-batch 1 tokens count differently" in one.problems[0]
        assert "from sequence to sequence" in one.problems[0]
        weights_of_two = one.record()["micro_batches"][0]["sequence_weights"]
        assert weights_of_two["0"] / weights_of_two["1"] == pytest.approx(5 / 2, rel=1e-3)  # of 2 and 5 trained tokens


@pytest.mark.parametrize(("factor", "said"), [(0.25, "0.25"), (4.0, "4"), (0.5, "0.5")])
def test_a_gradient_that_is_too_large_or_too_small_as_a_whole_is_named(factor, said):
    for one in audited(lambda model, one, total: factor * right(model, one, total)):
        assert one.problems == (f"the gradient is {said} times that of the mean loss per token",)


def test_a_sum_over_tokens_is_a_remark():
    for one in audited(lambda model, one, total: total * right(model, one, total)):
        assert one.state == "balanced"
        assert "the loss is the sum over all tokens, not their mean" in one.remarks


def test_clipping_and_a_loss_scale_are_no_wrong_scale():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    with trainfix.ledger(model, optimizer) as verdicts:
        for scale, clip in ((1.0, 0.01), (2.0**16, None), (2.0**16, 0.01)):
            ones = [batch(number) for number in range(4)]
            for one in ones:
                (scale * right(model, one, torch.tensor(sum(map(count, ones))))).backward()
            for one in model.parameters():
                one.grad.div_(scale)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    assert [(one.state, one.scale) for one in verdicts] == [("balanced", 1.0)] * 3


def shifted(by):
    def change(one):
        return {**one, "labels": one["labels"].roll(by, 1)}

    return change


def test_labels_that_are_shifted_twice_are_named():
    for one in audited(change=shifted(-1)):
        assert one.state == "not balanced"
        assert "labels are shifted twice" in one.problems[0]


def test_labels_that_are_not_shifted_are_named():
    for one in audited(change=shifted(1)):
        assert one.state == "not balanced"
        assert "labels are not shifted" in one.problems[0]


def test_padding_that_is_trained_is_named():
    def change(one):
        return {**one, "labels": torch.where(one["attention_mask"] == 0, one["input_ids"], one["labels"])}

    for one in audited(change=change):
        assert one.state == "not balanced"
        assert any("trained positions predict padding" in problem for problem in one.problems)


def packed(number, *, masked):
    """Two documents in one row; masked: the second one's first token is not predicted from the first one's last."""
    rows = batch(number, rows=2)
    kept = [rows["attention_mask"][row].bool() for row in range(2)]
    ids = torch.cat([rows["input_ids"][row][kept[row]] for row in range(2)])[None]
    places = torch.cat([torch.arange(int(one.sum())) for one in kept])[None]
    labels = ids.clone()
    if masked:
        labels[places == 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": places}


@pytest.mark.parametrize("masked", [True, False])
def test_labels_across_a_document_boundary_are_named_and_packing_done_right_is_not(masked):
    for one in audited(batches=[packed(number, masked=masked) for number in range(4)]):
        found = [problem for problem in one.problems if "first token of the next document" in problem]
        assert (one.state, len(found)) == (("balanced", 0) if masked else ("not balanced", 1))


def test_labels_without_weight_and_weight_without_labels_are_named():
    def half(model, one, total):
        taken = {**one, "labels": one["labels"].clone()}
        taken["labels"][:, -2:] = IGNORED
        logits = model(**one).logits[:, :-1].reshape(-1, VOCABULARY)
        labels = taken["labels"][:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total

    def everything(model, one, total):
        logits = model(**one).logits[:, :-1].reshape(-1, VOCABULARY)
        return torch.nn.functional.cross_entropy(logits, one["input_ids"][:, 1:].reshape(-1), reduction="sum") / total

    for one in audited(half):
        assert any("have a label but no weight in the loss" in problem for problem in one.problems)
    for one in audited(everything):
        assert any("are trained although their label is masked" in problem for problem in one.problems)


def test_a_prompt_that_only_some_sequences_train_is_a_remark():
    def change(one):
        labels = one["labels"].clone()
        labels[0, :4] = one["input_ids"][0, :4]
        return {**one, "labels": labels}

    for one in audited(change=change):
        assert any("4 of 8 sequences are trained from their first token on" in remark for remark in one.remarks)
    for one in audited():
        assert not [remark for remark in one.remarks if "first token" in remark]


def test_label_smoothing_is_a_remark_and_uneven_means_under_it_are_named():
    def smoothed(model, one, total):
        logits = model(**{key: one[key] for key in ("input_ids", "attention_mask")}).logits[:, :-1]
        labels = one["labels"][:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy
        return loss(logits.reshape(-1, VOCABULARY), labels, reduction="sum", label_smoothing=0.1) / total

    for one in audited(smoothed):
        assert one.state == "balanced"
        assert "label smoothing of 0.1" in one.remarks
    for one in audited(lambda model, one, total: smoothed(model, one, 4 * count(one))):
        assert one.state == "not balanced"


def other_losses():
    """Losses in which tokens have no common weight: none of our business."""

    def logits_of(model, one):
        return model(**{key: one[key] for key in ("input_ids", "attention_mask")}).logits[:, :-1]

    def each(model, one):
        return torch.nn.functional.cross_entropy(
            logits_of(model, one).transpose(1, 2), one["labels"][:, 1:], reduction="none"
        )

    def z_loss(model, one, total):
        logits = logits_of(model, one)
        return (each(model, one).sum() + (logits.logsumexp(-1) ** 2).sum()) / total

    def preference(model, one, total):
        scores = -each(model, one).sum(1)
        return -torch.nn.functional.logsigmoid(scores[0] - scores[1]) / 4

    def policy(model, one, total):
        advantages = torch.tensor([0.7, -0.4])
        return (advantages[:, None] * each(model, one)).sum() / total

    def weighted(model, one, total):
        losses = each(model, one)
        return (losses * torch.exp(-losses.detach() * torch.linspace(0.5, 1.5, losses.shape[1]))).sum() / total

    def distilled(model, one, total):
        logits = logits_of(model, one)
        teacher = torch.softmax(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)), -1)
        return torch.nn.functional.kl_div(torch.log_softmax(logits, -1), teacher, reduction="sum") / total

    return {one.__name__: one for one in (z_loss, preference, policy, weighted, distilled)}


@pytest.mark.parametrize("name", other_losses())
def test_other_losses_balance_and_their_tokens_are_not_judged(name):
    for one in audited(other_losses()[name]):
        assert one.state == "balanced", one.line()
        assert any("not judged" in remark for remark in one.remarks)


@pytest.mark.parametrize(
    "how", [{"left": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"length": 200}], ids=str
)
def test_left_padding_16_bits_and_long_sequences_are_even(how):
    for one in audited(**how):
        assert one.state == "balanced", one.line()
        assert one.tokens.verdict == "even"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_even(reentrant):
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in audited(model=model.train()):
        assert (one.state, one.tokens.verdict) == ("balanced", "even")


def test_a_loss_that_takes_hidden_states_in_chunks_is_seen():
    def chunked(model, one, total):
        hidden = model.model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).last_hidden_state
        hidden, labels = hidden[:, :-1].reshape(-1, hidden.shape[-1]), one["labels"][:, 1:].reshape(-1)
        parts = zip(hidden.split(7), labels.split(7), strict=True)
        loss = torch.nn.functional.cross_entropy
        return sum(loss(model.lm_head(h), y, reduction="sum") for h, y in parts) / total

    def fused(model, one, total):
        hidden = model.model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).last_hidden_state
        logits = hidden[:, :-1].reshape(-1, hidden.shape[-1]) @ model.lm_head.weight.T  # without calling the module
        return torch.nn.functional.cross_entropy(logits, one["labels"][:, 1:].reshape(-1), reduction="sum") / total

    for loss in (chunked, fused):
        for one in audited(loss):
            assert (one.state, one.tokens.verdict) == ("balanced", "even"), one.line()
        for one in audited(lambda model, one, total, loss=loss: loss(model, one, 4 * count(one))):
            assert one.tokens.verdict == "uneven"


def test_several_passes_in_one_backward_are_one_micro_batch():
    def both(model, one, total):
        return right(model, one, 2 * total) + right(model, one, 2 * total)

    for one in audited(both):
        assert (one.state, one.tokens.verdict, one.scale) == ("balanced", "even", 1.0)


def test_a_frozen_body_and_a_frozen_head_are_even():
    for frozen in ("model", "lm_head"):
        model = build()
        getattr(model, frozen).requires_grad_(False)
        for one in audited(model=model):
            assert one.state == "balanced"
            assert one.tokens is None if frozen == "model" else one.tokens.verdict == "even"


def test_an_encoder_decoder_is_read_by_its_decoders_ids():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()  # without dropout

    def loss(model, one, total):
        found = model(**one).logits.reshape(-1, VOCABULARY)
        return torch.nn.functional.cross_entropy(found, one["labels"].reshape(-1), reduction="sum") / every

    ones = [batch(number, prompt=0) for number in range(4)]
    every = sum(int((one["labels"] != IGNORED).sum()) for one in ones)  # a decoder's labels are not shifted
    for one in audited(loss, model=model, batches=ones):
        assert one.state == "balanced", one.line()
        assert one.tokens.verdict == "even"


def test_a_masked_model_is_audited_without_its_tokens():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    for one in audited(lambda model, one, total: model(**one).loss / 4, model=model):
        assert (one.state, one.tokens) == ("balanced", None)


def test_a_classifier_is_audited_without_tokens():
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=3))

    def loss(model, one, total):
        return model(one["input_ids"], one["attention_mask"], labels=torch.tensor([0, 2])).loss / 4

    for one in audited(loss, model=model):
        assert (one.state, one.tokens) == ("balanced", None)


def test_the_tiny_llama_of_the_proofs_is_read_too():
    for one in audited(model=tiny_llama()):
        assert (one.state, one.tokens.verdict) == ("balanced", "even")
