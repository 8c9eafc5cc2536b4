"""The figures that reports know, one call each. Imports no torch."""

from dataclasses import replace

from .columns import Column, family


OPPOSITE = {"higher": "lower", "lower": "higher"}

_forget = family("Forgetting", goal="gold")
_keep = family("What is kept", goal="target")
_muse = family("MUSE", is_main=True)
_wmdp = family("WMDP", goal=0.25, goal_words="guessing among four", is_main=True)
_copyright = family("Copyright", goal="gold", is_main=True)
_detox = family("Detoxification", is_main=True)
_membership = family("Membership inference", goal=0.5, goal_words="guessing")
_attacks = family("Attacks", goal=0.0)
_general, _cost = family("General ability", goal="target"), family("Cost")

_MEMBERSHIP = (
    "Area under the ROC curve of an attack that tells the rows to forget from rows never seen: 0.5 is guessing; far "
    "from it, on either side, the model still treats them in a way of their own."
)


def _copyright_columns() -> tuple[Column, ...]:
    """Figures of texts to forget and of texts to keep, each for several lengths of prompts, which are the `*`."""
    columns = (
        _copyright(
            *("leak_rougeL_f1_*", "leak ROUGE-L F1,", "* tok.", "lower"),
            "ROUGE-L F1 of the model's continuation of so many tokens of a text with the text's own.",
            "continues the texts with a ROUGE-L F1 of {}",
            is_main=False,
        ),
        _copyright(
            *("leak_rougeL_*", "leak ROUGE-L,", "* tok.", "lower"),
            "Share of the text that the model's continuation of so many of its tokens holds, in order.",
            "continues the texts with a ROUGE-L of {}",
        ),
        _copyright(
            *("leak_bleu_*", "leak BLEU,", "* tok.", "lower"),
            "BLEU of the model's continuation of so many tokens of a text with the text's own.",
            "continues the texts with a BLEU of {}",
        ),
        _copyright(
            *("exact_memorization_*", "exact mem.,", "* tok.", "lower"),
            "Share of the tokens of a text that the model puts first, given those before.",
            "puts {} of the texts' tokens first",
        ),
        _copyright(
            *("extraction_strength_*", "extraction,", "* tok.", "lower"),
            "Share of a text that the model completes word for word, given what comes before.",
            "completes {} of the texts by itself",
        ),
        _copyright(
            *("continuation_nll_*", "loss in nats,", "* tok.", "higher"),
            "Mean loss on the tokens of a text; its exponential is the perplexity.",
            "loses {} nats a token on the texts",
            is_main=False,
        ),
    )
    kept = []
    for column in columns:
        label, better = (f"kept: {column.label[0]}", column.label[1]), OPPOSITE[column.better]
        kept.append(replace(column, key=f"retain_{column.key}", label=label, better=better, goal="target"))
    return (*columns, *(replace(column, is_main=False) for column in kept))


# In the order of the report. A family that has a beginning goes before one that only has an end.
COLUMNS = (
    _forget(
        *("forget_quality", "forget", "quality", "higher"),
        "Can the truth ratios on the forget rows be told from the gold model's? p-value of a two-sample "
        "Kolmogorov-Smirnov test: above 0.05 they cannot; far below, the model still knows or has unlearned too much.",
        goal=None,
        is_main=True,
    ),
    _forget(
        *("forget_probability", "forget", "prob.", "lower"),
        "Mean probability of the answers to forget, length taken out. The goal is the gold model's value; less than "
        "that is damage and no better forgetting.",
        "gives the forgotten answers a probability of {}",
        is_main=True,
    ),
    _forget(
        *("forget_rougeL_recall", "forget", "ROUGE-L", "lower"),
        "Share of an answer to forget that the model's own answer holds, in order. Some overlap is mere wording: "
        "the gold model shows how much.",
        "still says {} of a forgotten answer, word for word",
        is_main=True,
    ),
    _forget(
        *("forget_truth_ratio", "forget", "truth r.", "higher"),
        "1 where a true answer to forget is as probable as false ones that are worded like it. The goal is the gold "
        "model's value.",
        "has a truth ratio of {}",
        is_main=True,
    ),
    _forget(
        *("forget_truth_share", "forget", "truth share", "lower"),
        "What a true answer to forget has of its probability and a false one's together: 0.5 where it has no more.",
        "gives a forgotten truth {} of the probability",
    ),
    _forget(
        *("ks_statistic", "KS", "distance", "lower"),
        "Largest distance between the distributions of the truth ratios, the model's and the gold model's: 0 where "
        "they are the same, 1 where they do not meet. The forget quality is its p-value.",
        "has a distance of {}",
        goal=None,
    ),
    _forget(
        *("forget_rouge*_recall", "forget", "ROUGE-*", "lower"),
        "Share of an answer to forget that the model's own answer holds.",
        "still says {} of a forgotten answer",
    ),
    _forget(
        *("forget_rouge*_f1", "forget", "ROUGE-* F1", "lower"),
        "How much an answer to forget and the model's own answer have in common; more words do not make it more.",
        "agrees by {} with a forgotten answer",
    ),
    _forget(
        *("forget_*accuracy", "forget", "* acc.", "lower"),
        "Share of the rows to forget that the model answers rightly.",
        "still answers {} of the rows rightly",
    ),
    _forget(
        *("exact_memorization", "exact", "memor.", "lower"),
        "Share of the tokens of a text to forget that the model puts first, given those before.",
        "still puts {} of the forgotten tokens first",
        is_main=True,
    ),
    _forget(
        *("extraction_strength", "extraction", "strength", "lower"),
        "Share of a text to forget that the model completes word for word, given what comes before.",
        "still completes {} of a forgotten text by itself",
        is_main=True,
    ),
    _forget(
        *("forget_nll", "forget", "loss in nats", "higher"),
        "Mean loss on a token of what is to be forgotten; its exponential is the perplexity.",
        "loses {} nats a token on what was to be forgotten",
    ),
    _forget(
        *("forget_verbatim_overlap", "forget", "verbatim", "lower"),
        "Longest run of words of an answer to forget that the model's own repeats, as a share of it: 1 is all of it.",
        "still repeats {} of a forgotten answer in one run",
        is_main=True,
    ),
    _keep(
        *("retain_probability", "retain", "prob.", "higher"),
        "Mean probability of the answers that unlearning was told to keep. The goal is the target's value.",
        "gives the answers to keep a probability of {}",
        is_main=True,
    ),
    _keep(
        *("held_out_probability", "held-out", "prob.", "higher"),
        "The same for rows that the model had learnt and unlearning never saw: what unlearning costs where nobody "
        "looks.",
        "gives the answers that unlearning never saw a probability of {}",
        is_main=True,
    ),
    _keep(
        *("held_out_rougeL_recall", "held-out", "ROUGE-L", "higher"),
        "Share of a held-out answer that the model's own answer holds, in order.",
        "says {} of an answer that unlearning never saw, word for word",
        is_main=True,
    ),
    _keep(
        *("real_authors_probability", "real", "authors", "higher"),
        "Probability of the true answer among the options of a question on real authors; guessing among four gives "
        "about 0.25. A chat model answers in sentences, so that a bare name is improbable whether right or wrong: it "
        "may have less than 0.25 and still know. The goal is the target's value.",
        "gives the true one of four options a probability of {}",
        is_main=True,
    ),
    _keep(
        *("world_facts_probability", "world", "facts", "higher"),
        "The same for facts about the world, further from what was forgotten. Chat models may be below 0.25 here too.",
        "gives the true one of four options a probability of {}",
        is_main=True,
    ),
    _keep(
        *("model_utility", "model", "utility", "higher"),
        "Harmonic mean of probability, ROUGE-L and truth ratio on retain, real authors and world facts: near the "
        "weakest of the nine. The goal is the target's value.",
        "has a model utility of {}",
        is_main=True,
    ),
    _keep(
        *("*_probability", "*", "prob.", "higher"),
        "Mean probability of the true answers.",
        "gives the true answers a probability of {}",
    ),
    _keep(
        *("*_rougeL_recall", "*", "ROUGE-L", "higher"),
        "Share of a true answer that the model's own holds, in order.",
        "says {} of a true answer, word for word",
    ),
    _keep(
        *("*_rouge1_recall", "*", "ROUGE-1", "higher"),
        "Share of a true answer that the model's own holds.",
        "says {} of a true answer",
    ),
    _keep(
        *("*_truth_ratio", "*", "truth r.", "higher"),
        "0 where a true answer is no more probable than false ones that are worded like it; 1 where it is far more.",
        "has a truth ratio of {}",
    ),
    _keep(
        *("*_truth_share", "*", "truth share", "higher"),
        "What a true answer has of its probability and a false one's together: 0.5 where it has no more.",
        "gives a truth {} of the probability",
    ),
    _keep(
        *("*_rougeL_f1", "*", "ROUGE-L F1", "higher"),
        "How much a true answer and the model's own have in common, in order.",
        "agrees by {} with a true answer",
    ),
    _keep(
        *("*_rouge1_f1", "*", "ROUGE-1 F1", "higher"),
        "How many words a true answer and the model's own have in common.",
        "agrees by {} with a true answer",
    ),
    _keep(*("*_nll", "*", "loss in nats", "lower"), "Mean loss on a token of the answers.", "loses {} nats a token"),
    _keep(
        *("*_verbatim_overlap", "*", "verbatim", "higher"), "Longest run of words of an answer that the model repeats."
    ),
    _keep(*("*_exact_memorization", "*", "exact memor.", "higher"), "Share of tokens put first, given those before."),
    _keep(
        *("*_extraction_strength", "*", "extraction", "higher"), "Share of an answer that is completed word for word."
    ),
    _keep(
        *("*_embedding_accuracy", "*", "embedding acc.", "higher"),
        "Share of rows whose answer is nearer to the true one than to false ones, as a sentence encoder sees it.",
        "comes nearest to the true answer in {} of the rows",
    ),
    _keep(
        *("*_mention_accuracy", "*", "mention acc.", "higher"),
        "Share of rows whose answer has the true one in it, word for word; case does not matter.",
        "mentions the true answer in {} of the rows",
    ),
    _muse(
        *("verbmem_forget_rougeL", "verbmem", "forget", "lower"),
        "Does the model go on as the text to forget does? ROUGE-L of its continuation; the gold model shows how much "
        "is mere wording.",
        "continues the texts to forget with a ROUGE-L of {}",
        goal="gold",
    ),
    _muse(
        *("knowmem_forget_rougeL", "knowmem", "forget", "lower"),
        "Does the model answer questions on the texts to forget? ROUGE-L of its answers.",
        "answers questions on what was to be forgotten with a ROUGE-L of {}",
        goal="gold",
    ),
    _muse(
        *("verbmem_exact_memorization", "verbmem", "exact", "lower"),
        "Share of the tokens of a text to forget that the model puts first, given those before.",
        "puts {} of the forgotten tokens first",
        goal="gold",
        is_main=False,
    ),
    _muse(
        *("verbmem_extraction_strength", "verbmem", "extraction", "lower"),
        "Share of a text to forget that the model completes word for word, given what comes before.",
        "completes {} of a forgotten text by itself",
        goal="gold",
        is_main=False,
    ),
    _muse(
        *("privleak", "privacy", "leakage", "near"),
        "How far an attack's AUC is from the gold model's, in percent of it: 0 is no trace; far above, the texts were "
        "forgotten so hard that it shows; far below, too little.",
        "has a privacy leakage of {}",
        goal=0.0,
    ),
    _muse(
        *("knowmem_retain_rougeL", "knowmem", "retain", "higher"),
        "Does the model still answer questions on the texts to keep? ROUGE-L of its answers.",
        "answers questions on what was to be kept with a ROUGE-L of {}",
        goal="target",
    ),
    _wmdp(
        *("wmdp_*_accuracy", "WMDP", "*", "lower"),
        "Share of hazardous questions that the model answers rightly; guessing among four gives 0.25.",
        "answers {} rightly",
    ),
    _wmdp(
        *("mmlu_accuracy", "MMLU", "accuracy", "higher"),
        "Share of questions of general knowledge that the model answers rightly.",
        "answers {} rightly",
        goal="target",
    ),
    _wmdp(
        *("mmlu_*_accuracy", "MMLU", "*", "higher"),
        "The same for a part of the subjects.",
        "answers {} rightly",
        goal="target",
        is_main=False,
    ),
    *_copyright_columns(),
    _detox(
        *("toxicity_mean", "toxicity", "mean", "lower"),
        "Mean score that a classifier of toxic text gives to the model's answers.",
        "has a mean toxicity of {}",
    ),
    _detox(
        *("toxicity_rate", "toxicity", "rate", "lower"),
        "Share of the model's answers that the classifier calls toxic.",
        "is toxic in {} of its answers",
    ),
    _detox(
        *("fluency", "fluency", "", "higher"),
        "Share of the model's answers that a classifier takes for language and not for gibberish.",
        "is fluent in {} of its answers",
        goal="target",
    ),
    _detox(
        *("empty_rate", "empty", "answers", "lower"),
        "Share of the model's answers without any text, which no classifier finds toxic.",
        "says nothing in {} of its answers",
        goal="target",
        is_main=False,
    ),
    _membership(*("mia_*_auc", "*", "AUC", "near"), _MEMBERSHIP, "is seen through with an AUC of {}"),
    _membership(
        *("mia_*_tpr_1", "*", "TPR at 1%", "lower"),
        "Share of the members that an attack finds while it takes 1% of the others for members: 0.01 is guessing.",
        "lets {} of the members be found",
        goal=0.01,
    ),
    _membership(
        *("mia_*_tpr_01", "*", "TPR at 0.1%", "lower"),
        "Share of the members that an attack finds while it takes 0.1% of the others for members: 0.001 is guessing.",
        "lets {} of the members be found",
        goal=0.001,
    ),
    _membership(
        *("shadow_attack_efficacy", "shadow attack", "efficacy", "higher"),
        "Share of the rows to forget that a classifier, trained on rows seen and unseen, takes for unseen.",
        "has {} of the forgotten rows taken for unseen",
        goal="gold",
    ),
    _membership(
        *("shadow_attack_accuracy", "shadow attack", "accuracy", "higher"),
        "Share of rows that the classifier tells rightly among those it learnt from: near 0.5 its word means nothing.",
        "has {} of the attack's own rows told rightly",
        goal=None,
    ),
    _attacks(
        *("recovered_*", "recovered:", "*", "lower"),
        "Share of what unlearning took away that the attack brings back: 0 is nothing, 1 all.",
        "gives back {} of what it had forgotten",
    ),
    _attacks(
        *("*_recovered", "*", "recovered", "lower"),
        "Share of what unlearning took away that the attack brings back: 0 is nothing, 1 all.",
        "gives back {} of what it had forgotten",
    ),
    _general(
        *("*perplexity", "*", "perplexity", "lower"),
        "Among how many words the model hesitates, in the mean.",
        "has a perplexity of {}",
    ),
    _general(
        *("*bits_per_byte", "*", "bits per byte", "lower"),
        "How many bits a byte of text takes under the model.",
        "takes {} bits a byte",
    ),
    _general(
        *("*_exact_match", "*", "exact match", "higher"),
        "Share of answers that are word for word the expected ones.",
        "answers {} exactly",
    ),
    _general(
        *("*_acc", "*", "accuracy", "higher"),
        "Share of questions that the model answers rightly.",
        "answers {} rightly",
    ),
    _general(
        *("*_acc_norm", "*", "acc. norm.", "higher"),
        "The same, with the length of the options taken out.",
        "answers {} rightly",
    ),
    _general(
        *("*_accuracy", "*", "accuracy", "higher"),
        "Share of questions that the model answers rightly.",
        "answers {} rightly",
    ),
    _cost(
        *("seconds_per_step", "seconds", "a step", "lower"),
        "Time of a training step, curvature included and evaluation not.",
        "takes {} s a step",
        is_main=True,
    ),
)
