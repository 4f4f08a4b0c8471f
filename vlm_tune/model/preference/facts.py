"""What is logged of pairs of answers, by name; nothing here waits for torch."""

LOSSES = ("sigmoid", "bco", "nll")  # the parts of the loss, before they are weighted
FACTS = (
    *LOSSES,
    "accuracy",  # share of the pairs whose chosen answer has the higher reward
    "margin",  # by which it has
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",
    "logp_rejected",
)
