"""An invented run: the metrics and curves of all stages, for the tests of the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from gpt2.heads.redundancy import COSINES
from gpt2.heads.similarity import HeadsConfig
from gpt2.heads.study import summarise_heads
from gpt2.model.config import GPTConfig
from gpt2.norm_study.tables import tabulate_settings
from gpt2.pipeline.files import read_json, write_csv, write_json
from gpt2.prune.criteria import COST_SIMILARITIES, SIMILAR_ORDERS
from gpt2.prune.single_heads import COST_PREDICTORS, HeadCost
from gpt2.report.document import TIMED_STAGES
from gpt2.report.names import PRUNED_RATES
from gpt2.report.results import Results

NORMS = ("preln", "postln", "deepnorm")
TRAIN_COLUMNS = "step tokens loss lr grad_norm"
EVAL_COLUMNS = "step tokens val_loss hellaswag_acc hellaswag_acc_norm"
LAYER_COLUMNS = "step layer grad_norm activation_norm"
RUN_KEYS = "arm norm max_lr warmup_steps seed"
CRITERIA = ("redundancy", "taylor", "magnitude", "random", "loss", "taylor_iterative")
# Bits per byte at the best size, overall and of rare words: mean, lowest, highest, uniform guess.
CENTRES = (2.5, 2.4, 2.6, 4.5, 4.0, 3.9, 4.1, 5.0)
# A choice of heads compared with random sets.
SETS = {"cheaper_random_sets_at_15": 40, "matched_random_sets_perplexity_rise_percent_at_15": 6.0,
        "cheaper_matched_random_sets_at_15": 3, "matched_random_sets_at_15": 199}  # fmt: skip
# Figures of the two replicates that differ from those of the main model.
OTHERS = {"train.val_loss": (3.279, 3.281), "train.val_bits_per_byte": (1.02, 1.0), "heads.redundant_pairs": (6, 9)}
VOCABULARIES = {"bpe_1024": 1024, "bpe_4096": 4096, "bpe_16384": 16384, "gpt2": 50257}


def invent_run(root: Path, scale: str = "tiny", norm: str = "preln", n_layer: int = 4, n_head: int = 8) -> Results:
    """Write the outputs of all stages: a run in which every claim that the scale can test holds."""
    settings = {
        "prepare": {"source": "fineweb_edu" if scale == "full" else "docs"},
        "benchmark": {"source": "hub" if scale == "full" else "heldout"},
        "model": {"n_layer": n_layer, "n_head": n_head, "n_embd": 16 * n_head, "block_size": 256},
        "train": {"max_steps": 250, "max_lr": 0.001},
        "norm_study": {"n_layer": 12, "max_steps": 120},
    }
    write_json(root / "params.yaml", {"norm": norm, "scale": scale, scale: settings})
    _invent_training(root, n_layer)
    _invent_norm_study(root)
    _invent_tokenizer_study(root)
    _invent_heads(root, n_layer, n_head)
    _invent_pruning(root, n_layer * n_head)
    _invent_replicates(root)
    for stage in {*TIMED_STAGES} - {"prune"}:
        _write_metrics(root, f"speed/{stage}", seconds=60.5, peak_memory_gib=0.75)
    times = {"seconds": 12 * 3600, "peak_memory_gib": 1.5, "processes": 2, "tokens_per_s": 412_345.6}
    _write_metrics(root, "speed/train", **times)
    return Results(root, norm, scale, settings)


def _write_metrics(root: Path, stem: str, **figures: float | str) -> None:
    write_json(root / f"metrics/{stem}.json", figures)


def _write_curve(root: Path, name: str, columns: str, rows: Iterable[Sequence]) -> None:
    write_csv(root / f"plots/{name}.csv", columns.split(), rows)


def _cross(keys: Iterable[str], ends: Mapping[str, float]) -> dict[str, float]:
    """Every key with every end, and the value of the end."""
    return {f"{key}{end}": value for key, (end, value) in product(keys, ends.items())}


def _invent_training(root: Path, n_layer: int) -> None:
    rng = np.random.default_rng(0)
    losses = 4.5 + 6.3 * np.exp(-np.arange(1, 251) / 40) + rng.normal(0, 0.08, 250)
    rows = [(s, 4096 * s, loss, 1e-3, 0.8 + 3 / s) for s, loss in enumerate(losses, start=1)]
    _write_curve(root, "train/train", TRAIN_COLUMNS, rows)
    evaluations = [
        (s, 4096 * s, 4.6 + 6.2 * math.exp(-s / 40), 0.24 + 0.0002 * s, 0.25 + 0.0006 * s) for s in range(0, 251, 50)
    ]
    _write_curve(root, "train/eval", EVAL_COLUMNS, evaluations)
    layers = [
        (s, layer, 0.3 * math.exp(-s / 200) / (layer + 2), 0.05 * (layer + 2) * (1 + s / 50))
        for s, layer in product(range(0, 251, 25), range(-1, n_layer))
    ]
    _write_curve(root, "train/layers", LAYER_COLUMNS, layers)
    samples = [("The array", 'is a <b>view</b> of | `x_y` *and*\n# "more"'), ("Return", "None"), ("A", "b")]
    _write_curve(root, "generate/samples", "prompt text", samples)
    train = {
        "n_params": 124_439_808, "steps": 95_365, "max_steps": 95_365, "tokens_per_step": 524_288, "epochs": 5.0,
        "tokens_seen": 49_999_000_000, "val_loss": 3.28, "val_perplexity": 26.6, "val_bits_per_byte": 1.01,
        "unigram_entropy": 7.1, "max_grad_norm": 3.8, "loss_spikes": 0, "diverged": 0, "diverged_at_step": -1,
        "stalled": 0, "hellaswag_items": 2000, "windows_per_epoch": 900, "windows_in_same_place": 1,
        "attention_backend": "flash", "val_loss_late_fall_percent": 0.5, "hellaswag_acc_norm": 0.30,
        "hellaswag_first_acc_norm": 0.25, "hellaswag_rank_correlation": 0.9, "hellaswag_evaluations": 6,
    }  # fmt: skip
    _write_metrics(root, "train", **train)
    scores = {"completion_acc": 0.28, "completion_acc_norm": 0.30, "harness_acc": 0.28, "harness_acc_norm": 0.31}
    scores |= _cross(scores, {"_stderr": 0.0046}) | _cross(["completion_acc_norm_clean"], {"": 0.3, "_stderr": 0.005})
    _write_metrics(root, "hellaswag", items=10_042, documents=9000, clean_items=10_000, **scores)
    _write_metrics(root, "prepare", documents_train=9800, documents_val=100, documents_test=100)
    tokens = {"tokens_train": 9_800_000_000, "benchmark_items": 2000, "benchmark_items_in_train": 0}
    _write_metrics(root, "tokens", vocab_size=50257, encoding="gpt2", **tokens)


def _invent_replicates(root: Path) -> None:
    """The main model and two others, whose figures are the same except for those of OTHERS."""
    figures = {
        f"{stem}.{key}": value
        for stem in ("train", "hellaswag", "heads", "prune")
        for key, value in read_json(root / f"metrics/{stem}.json").items()
    }
    models = pd.DataFrame([{"seed": seed, **figures} for seed in (1337, 1, 2)])
    models = models.assign(**{name: [figures[name], *values] for name, values in OTHERS.items()})
    (root / "plots/replicates").mkdir(exist_ok=True)
    models.to_csv(root / "plots/replicates/models.csv", index=False)


def _invent_norm_study(root: Path) -> None:
    """Pre-LN learns everywhere. Post-LN spikes at the higher rate with a warm-up, and stalls there without one."""
    rng = np.random.default_rng(1)
    learns = 4 + 5 * np.exp(-np.arange(120) / 30) + rng.normal(0, 0.05, 120)
    settings = [*product(["main"], NORMS, (3e-3, 1e-3), (0, 10)), *product(["muon"], NORMS, [1e-3], [10])]
    runs, steps = [], []
    for setting in settings:
        spikes, stalled = (int(setting == ("main", "postln", 3e-3, warmup)) for warmup in (10, 0))
        curve = np.maximum(learns, 6.8) if stalled else learns
        loss = 6.9 if stalled else 4.0 + 100 * setting[2]
        faults = (spikes, 0, -1, stalled, 5.5, 1.0 if stalled else 0.2, 1e-4 if stalled else 0.8)
        for seed in (1, 2):
            runs.append((*setting, seed, loss, *faults))
            steps += [(*setting, seed, s + 1, curve[s], 0.3 * curve[s]) for s in range(120)]
    outcomes = "val_loss loss_spikes diverged diverged_at_step stalled max_grad_norm token_cosine grad_ratio"
    _write_curve(root, "norm_study/runs", f"{RUN_KEYS} {outcomes}", runs)
    _write_curve(root, "norm_study/curves", f"{RUN_KEYS} step loss grad_norm", steps)
    p_values = {"postln_rough_cmh_p": 0.03, "postln_lost_cmh_p": 0.02}
    _write_metrics(root, "norm_study", unigram_entropy=6.8, unigram_val_loss=6.85, **p_values)
    _tabulate_norms(root)


def _tabulate_norms(root: Path) -> None:
    """Make the table of the norm study and the counts of its metrics from its runs."""
    runs = pd.read_csv(root / "plots/norm_study/runs.csv")
    tabulate_settings(runs).to_csv(root / "plots/norm_study/table.csv", index=False)
    main = runs[runs["arm"] == "main"]
    bad = {"rough": main["loss_spikes"] + main["diverged"] > 0, "lost": main["stalled"] + main["diverged"] > 0}
    figures = read_json(root / "metrics/norm_study.json")
    for norm in NORMS:
        figures[f"{norm}_runs"] = int((main["norm"] == norm).sum())
        figures |= {f"{norm}_{kind}_runs": int((some & (main["norm"] == norm)).sum()) for kind, some in bad.items()}
    _write_metrics(root, "norm_study", **figures)


def _invent_tokenizer_study(root: Path) -> None:
    columns = (
        "name vocab_size bytes_per_token flops_per_byte rare_tokens_per_word compound_tokens_per_word "
        "technical_tokens_per_word tokens_per_document documents_in_context_percent renyi_efficiency tokens_per_word "
        "words_kept_whole_percent words_in_three_or_more_percent embedding_params embedding_params_percent logits_bytes"
    )
    rows = [
        (name, size, 0.4 * math.log(size), 4e6 - 300 * size / 10, *(c - 0.25 * math.log(size) for c in (5.1, 4.4, 4.8)),
         300.0, 40.0, 0.5, 1.5, 70.0, 9.0, 128 * size, 60.0, 512 * size)
        for name, size in VOCABULARIES.items()
    ]  # fmt: skip
    _write_curve(root, "tokenizer/vocabularies", columns, rows)
    bands = [
        (name, size, band, 5 + place - 0.25 * math.log(size), 10.0 * place)
        for name, size in VOCABULARIES.items()
        for place, band in enumerate(("100 or more", "10 to 99", "once"))
    ]
    columns = "name vocab_size band tokens_per_word words_in_three_or_more_percent"
    _write_curve(root, "tokenizer/bands", columns, bands)
    # At the smaller budget the middle size is best, at the larger one the largest of those trained here.
    runs = [
        (budget, name, size, 3, 100, 10**6, 0, *(c + rise * math.log(size / best) ** 2 for c in CENTRES))
        for budget, best, rise in ((1e10, 4096, 0.1), (1e11, 32768, 0.05))
        for name, size in VOCABULARIES.items()
    ]
    bits = "{0}bits_per_byte {0}bits_per_byte_low {0}bits_per_byte_high {0}even_bits_per_byte"
    columns = f"budget name vocab_size seeds steps bytes diverged {bits.format('')} {bits.format('rare_')}"
    _write_curve(root, "tokenizer/runs_table", columns, runs)
    table = pd.read_csv(root / "plots/tokenizer/runs_table.csv")
    seeds = [table.assign(seed=seed, chosen=1, lr=1e-3) for seed in (1, 2, 3)]
    # Small differences between seeds, the same for all vocabularies.
    for place, runs_of_seed in enumerate(seeds):
        runs_of_seed[["bits_per_byte", "rare_bits_per_byte"]] += 0.01 * place
    pd.concat(seeds).to_csv(root / "plots/tokenizer/runs.csv", index=False)
    _write_metrics(root, "tokenizer", runs_eval_bytes=40_000, runs_rare_bytes=900, cheaper_above_n_embd=256)
    words = {("nan", "rare"): "nan", ("dataframe", "compound"): "data|frame", ("a_b`c<d>", "technical"): "a|_b`|c<d>"}
    examples = [(*word, *[pieces] * len(VOCABULARIES)) for word, pieces in words.items()]
    _write_curve(root, "tokenizer/examples", f"word group {' '.join(VOCABULARIES)}", examples)


def _invent_heads(root: Path, n_layer: int, n_head: int) -> None:
    rng = np.random.default_rng(2)
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_head, block_size=1, vocab_size=1, norm="preln")
    matrices = {f"{null}uniform": np.full(n_layer * n_head, 0.5) for null in ("", "untrained_")}
    for shift, (name, _) in enumerate(COSINES.values()):
        vectors = rng.normal(0, 1, (n_layer * n_head, 6)) + 1.2 + 0.05 * shift
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        matrices[name] = np.abs(vectors @ vectors.T)
    rules = HeadsConfig(n_tokens=1, batch_size=1, threshold=0.85, null_percentile=95, seed=1)
    tables, figures = summarise_heads(config, matrices, rules)
    for name, table in tables.items():
        write_csv(root / f"plots/head_similarity/{name}.csv", list(table.columns), table.itertuples(index=False))
    shares = {"untrained": 60.0, "shuffled": 20.0}
    claimed = {"redundant_pairs": 8, "redundant_heads": 11, "redundant_pairs_middle_percent": 75.0}
    claimed |= {f"pairs_above_{null}_centred_threshold_percent": share for null, share in shares.items()}
    _write_metrics(root, "heads", **{**figures, **claimed})


def _invent_pruning(root: Path, n_heads: int) -> None:
    # The perplexity is 30 times e to the power of the share of removed heads times these.
    plain = dict(zip((*CRITERIA, "random_low", "random_high"), (1, 0.8, 2.5, 1.5, 0.5, 0.7, 1.1, 2.2), strict=True))
    powers = plain | {f"{name}_refit": power / 2 for name, power in plain.items() if "_" not in name}
    powers |= {"random_refit_low": 0.5, "random_refit_high": 1.1}
    powers |= {"redundancy_stepwise": 0.4, "taylor_stepwise": 0.3}
    powers |= {"redundancy_merge": 0.7, "redundancy_merge_refit": 0.35, "redundancy_mean": 0.9, "taylor_mean": 0.7}
    counts = range(0, n_heads, max(1, n_heads // 16))
    rows = []
    for removed in counts:
        rises = [30 * math.exp(power * (removed / n_heads)) for power in powers.values()]
        costs = (10**6 - 1000 * removed, 10**7 - 9000 * removed, 8192 - 64 * removed, 10**7 - 5000 * removed)
        rows.append((removed, 100 * (removed / n_heads), *rises, *costs))
    sizes = "params flops_per_token kv_cache_bytes_per_token memory_bytes"
    _write_curve(root, "prune/frontier", f"heads_removed heads_removed_percent {' '.join(powers)} {sizes}", rows)
    costs = [
        (layer, head, *[0.1 * head] * len(COST_SIMILARITIES), 0.2 * layer, 0.01 * head - 0.02)
        for layer, head in product(range(4), range(8))
    ]
    _write_curve(root, "prune/heads", " ".join(HeadCost._fields), costs)
    similarities = [
        (order, count, count + place, count, count + 2 * place + 1)
        for (place, order), count in product(enumerate(("redundancy", *SIMILAR_ORDERS)), counts[1:])
    ]
    _write_curve(root, "prune/similarities", "order heads_removed rise_percent low high", similarities)
    rise_key = "perplexity_rise_percent_at_15"
    metrics: dict[str, float] = {
        "baseline_perplexity": 30.0, "heads_removed_at_15": rows[2][0], "calibration_tokens": 16384,
        "pruned_heads": rows[3][0], "pruned_perplexity": 30.5, "random_sets": 199, "recovery_steps": 0,
        "attention_loss": 0.9, "pruned_perplexity_rise_percent": 1.7,
    }  # fmt: skip
    for column in powers:
        prefix = "" if column == "redundancy" else f"{column}_"
        rise, most = (2.1, 37.5) if column not in plain else (3.1, 18.75)
        metrics |= _cross([f"{prefix}{rise_key}"], {"": rise, "_low": rise - 1, "_high": rise + 1})
        metrics |= _cross([prefix], {"max_pruned_percent_below_5": most, **SETS})
    for place, order in enumerate(SIMILAR_ORDERS):
        rises = {rise_key: 2.0 + place / 2, f"{rise_key}_low": 1.0, f"{rise_key}_high": 9.0}
        metrics |= _cross([f"similarity_{order}_"], {**rises, **SETS, "cheaper_random_sets_at_15": 10 * place})
    for sets, rise in {"random_sets": 4.5, "random_sets_low": 1.2, "random_sets_high": 9.5, "random": 4.9}.items():
        metrics[f"{sets}_{rise_key}"] = rise
    models = [f"{model}_hellaswag_acc_norm" for model in ("whole", "redundancy_at_15", "pruned")]
    metrics |= _cross(models, {"": 0.3, "_stderr": 0.01, "_difference": -0.01, "_difference_margin": 0.02, "_p": 0.25})
    kinds = [f"{name}_rank_correlation{place}" for name, place in product(COST_PREDICTORS, ("", "_in_layer"))]
    metrics |= _cross(kinds, {"": -0.4, "_low": -0.6, "_high": -0.1, "_p": 0.04})
    _write_metrics(root, "prune", **metrics)
    faster = {f"heads_removed_{count}": 1 + count / n_heads for count in counts} | {"pruned": 1.2}
    rates = {f"{name}_{rate}": 1000.5 * faster[name] for name, rate in product(faster, PRUNED_RATES)}
    _write_metrics(root, "speed/prune", seconds=60.5, peak_memory_gib=0.75, **rates)


def set_metric(root: Path, name: str, value: float | str) -> None:
    """Change the metric file.key, of every model if it is one of a model."""
    stem, key = name.split(".")
    _write_metrics(root, stem, **{**read_json(root / f"metrics/{stem}.json"), key: value})
    models = pd.read_csv(root / "plots/replicates/models.csv")
    if name in models:
        set_models(root, name, [value] * len(models))


def set_models(root: Path, name: str, values: Sequence[float | str]) -> None:
    """Change a figure of the models, one value for each; fewer values leave fewer models."""
    path = root / "plots/replicates/models.csv"
    models = pd.read_csv(path).head(len(values))
    models.assign(**{name: values}).to_csv(path, index=False)


def set_norm_study(root: Path, rows: str, **values: float) -> None:
    """Set columns of the runs of the norm study that `rows` selects (a pandas query), and make the table again."""
    path = root / "plots/norm_study/runs.csv"
    runs = pd.read_csv(path)
    runs.loc[runs.query(rows).index, list(values)] = list(values.values())
    runs.to_csv(path, index=False)
    _tabulate_norms(root)


def break_off(root: Path) -> None:
    """Let the run diverge in its third step, before a second evaluation, and Post-LN in step 40 of the norm study."""
    rows = [(1, 4096, 10.8, 1e-3, 2.0), (2, 8192, 2e6, 1e-3, 1e9), (3, 12288, math.nan, 1e-3, math.inf)]
    _write_curve(root, "train/train", TRAIN_COLUMNS, rows)
    _write_curve(root, "train/eval", EVAL_COLUMNS, [(0, 0, 10.9, 0.24, 0.25)])
    _write_curve(root, "train/layers", LAYER_COLUMNS, [(0, -1, 1.0, 0.02), (0, 0, math.nan, math.inf)])
    for key, value in {"diverged": 1, "diverged_at_step": 3, "tokens_per_step": 4096, "val_loss": 10.9}.items():
        set_metric(root, f"train.{key}", value)
    set_norm_study(root, "norm == 'postln'", val_loss=math.nan, diverged=1, diverged_at_step=40, stalled=0)
    path = root / "plots/norm_study/curves.csv"
    curves = pd.read_csv(path)
    curves[(curves["norm"] != "postln") | (curves["step"] <= 40)].to_csv(path, index=False)


def load_weights(root: Path) -> None:
    """Let the run have trained nothing, as with weights from elsewhere."""
    _write_curve(root, "train/train", TRAIN_COLUMNS, [])
    _write_curve(root, "train/layers", LAYER_COLUMNS, [])
    _write_curve(root, "train/eval", EVAL_COLUMNS, [(0, 0, 3.3, 0.28, 0.29)])
    loaded = {"init_from": "models/openai", "init_sha256": "0123abcd", "train_loss": 3.25, "val_loss": 3.3, "steps": 0}
    for key, value in loaded.items():
        set_metric(root, f"train.{key}", value)
    set_models(root, "seed", [1337])
