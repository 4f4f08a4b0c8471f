"""How likely a model finds the expected answers, and each choice of a question: nothing is generated."""

from dataclasses import replace

from torch import Tensor

from vlm_tune.data.batch import Batch, add_pictures, collate
from vlm_tune.data.example import Example
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.evaluation.metrics import Metric, options_of
from vlm_tune.evaluation.prediction import Prediction, Question
from vlm_tune.model.build import Model
from vlm_tune.model.generate import answering
from vlm_tune.model.kernels import loss

PACK = 4096  # tokens of one pass, or those of one question with its choices


def weigh(model: Model, test: Conversations, questions: list[Question], metric: Metric) -> list[Prediction]:
    """Choose the likeliest choice of each question, or where there is nothing to choose, measure the expected answer.

    What is summed over an answer is the log-probability of its tokens, the end of the answer included.
    """
    answers = [choices(question) if metric.is_choice else [question.expected] for question in questions]
    measured = iter(token_losses(model, test, list(zip(questions, answers, strict=True))))
    predictions = []
    for question, given in zip(questions, answers, strict=True):
        losses = next(measured)
        if metric.is_choice:
            totals = [float(each.sum()) for each in losses]
            predictions.append(metric.graded(question.answered(given[totals.index(min(totals))])))
        else:
            share, tokens = float(losses[0].mean().neg().exp()), len(losses[0])
            predictions.append(replace(question.answered(""), score=share, tokens=tokens))
    return predictions


def choices(question: Question) -> list[str]:
    """List the answers to choose from, written as the expected one is: letters, or texts."""
    options = options_of(question.text)
    return list(options) if question.expected.strip() in options else list(options.values())


def token_losses(model: Model, test: Conversations, asked: list[tuple[Question, list[str]]]) -> list[list[Tensor]]:
    """Return the losses (N,) of the tokens of each answer to each question, in float64.

    All answers to one question stand behind its tokens, which are read once with its pictures.
    """
    measured: list[list[Tensor]] = []
    pack: list[tuple[Question, list[Example]]] = []
    for number, (question, answers) in enumerate(asked, 1):
        pack.append((question, encode_answers(test, question, answers)))
        size = sum(len(example.input_ids) for _, examples in pack for example in examples)
        if size >= PACK or number == len(asked):
            measured += pack_losses(model, test, pack)
            pack = []
    return measured


def encode_answers(test: Conversations, question: Question, answers: list[str]) -> list[Example]:
    """Encode a question with each of its answers, behind pictures of the same tiles."""
    samples = [with_answer(question, answer) for answer in answers]
    return test.encoder.encode_alike(samples, test.tiling(question.sample))


def with_answer(question: Question, answer: str) -> Sample:
    """Give a question an answer to its last turn, whose tokens alone are supervised."""
    turns = [replace(message, supervised=False) for message in question.sample.messages]
    turns[-1] = replace(turns[-1], parts=(question.thought + answer,), supervised=True)
    return replace(question.sample, messages=tuple(turns))


def pack_losses(model: Model, test: Conversations, pack: list[tuple[Question, list[Example]]]) -> list[list[Tensor]]:
    """Measure the questions of one pass, each with its answers."""
    examples = [example for _, answers in pack for example in answers]
    batch = collate(examples, [1.0] * len(examples), packing=True, trees=[len(answers) for _, answers in pack])
    shown = [answers[0] for _, answers in pack]
    tiles = [test.make_tiles(question.sample, example) for (question, _), example in zip(pack, shown, strict=True)]
    add_pictures(batch, shown, tiles, [], test.encoder.context_id)
    losses = iter(batch_losses(model, batch.to(model.vlm.device)).split([each.num_supervised for each in examples]))
    return [[next(losses) for _ in answers] for _, answers in pack]


def batch_losses(model: Model, batch: Batch) -> Tensor:
    """Return the loss of each supervised token of a batch: (N,), float64."""
    vlm = model.vlm
    with answering(model):
        embeddings = vlm.embed(batch.input_ids, batch.tiles, None, batch.spreads, batch.image_places)
        losses = loss.token_losses(vlm.read(embeddings, batch), vlm.llm.get_output_embeddings(), batch.targets)
    return losses.double().cpu()
