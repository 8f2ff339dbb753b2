"""Rows of Tables 1, 5, 6 and Fig. 5b, 7b: `train.py --ablation NAME` trains one, `python -m studies TABLE`
all.

A row: label, NAME, what it changes in a preset ({"section.key": value}, or a function of the preset), the
paper's numbers in the order of the columns, and which decoder is measured. All rows train one phase.
"""

from dataclasses import dataclass

LAYERS = ("low", "A", "B", "C", "D", "sem", "E", "L4")  # perceptual.LAYER_SETS: Table 6, and one of ours
LOW = {"phase1.alpha": 0.0}
CODEBOOK = LOW | {"tokenizer.warm_start": 0}  # Table 5 starts with quantization; a warm start is a K-means
SCALE = "ImageNet 256x256, batch 64, 500,000 steps each, Inception FID, 50,000"


@dataclass
class Row:
    label: str
    name: str
    changes: object
    paper: tuple
    decoder: str = "phase1"


def fn(config):
    """The paper's n_z = 32 and K = 8192, as an eighth and eight times of the preset's."""
    sizes = config["tokenizer"]
    K, width = sizes.get("codebook_size", 1024), sizes.get("codebook_dim", 256)
    return CODEBOOK | {"tokenizer.codebook": "fn", "tokenizer.codebook_dim": max(1, width // 8),
                       "tokenizer.codebook_size": 8 * K}


def kmeans(config):
    """Re-estimation from 2 % to 6 % of the steps: I20's 10,000, 2,000 and 30,000 of 500,000."""
    steps = config["phase1"]["steps"]
    return CODEBOOK | {"tokenizer.codebook": "kmeans", "tokenizer.kmeans_warmup": steps // 50,
                       "tokenizer.kmeans_every": max(1, steps // 250),
                       "tokenizer.kmeans_last": 3 * steps // 50}


TABLES = {
    "table1": dict(
        title="Table 1: decoders of more capacity (one phase, alpha = 0)",
        columns=("rfid", "ar_fid", "nar_fid"), scale=SCALE,
        rows=[Row("Baseline", "baseline", LOW, (3.45, 16.97, 13.26)),
              Row("+Conv x2", "+conv2", LOW | {"tokenizer.decoder_extra_blocks": 2}, (3.22, 17.19, 13.51)),
              Row("+Attention x2", "+attention2", LOW | {"tokenizer.num_attention": 2},
                  (2.90, 17.42, 14.02)),
              Row("+2x training", "+2x", lambda c: LOW | {"phase1.steps": 2 * c["phase1"]["steps"]},
                  (3.28, 16.19, 13.26))]),
    "table5": dict(
        title="Table 5: codebooks (one phase, alpha = 0)",
        columns=("usage", "rfid", "ar_fid", "nar_fid"), scale=SCALE,
        rows=[Row("VQGAN", "vqgan", CODEBOOK | {"tokenizer.codebook": "plain"},
                  (0.435, 4.07, 17.19, 14.58)),
              Row("+ F&N", "fn", fn, (0.997, 2.93, 24.91, None)),
              Row("+ K-means", "kmeans", kmeans, (1.0, 3.54, 16.84, 15.02)),
              Row("+ entropy", "entropy", CODEBOOK | {"tokenizer.codebook": "entropy"},
                  (1.0, 3.45, 16.97, 13.26))]),
    "table6": dict(
        title="Table 6: layers of the perceptual loss (one phase)",
        columns=("rfid", "ar_fid", "nar_fid"), scale=SCALE,
        rows=[Row("low", "low", LOW, (3.45, 16.97, 13.26)),  # alpha = 0
              Row("A: low + logit", "A", {"phase1.layers": "A"}, (3.01, 15.19, 11.78)),
              Row("B: 2_2 3_3 4_3 5_3 logit", "B", {"phase1.layers": "B"}, (2.93, 14.47, 11.58)),
              Row("C: 3_3 4_3 5_3 logit", "C", {"phase1.layers": "C"}, (2.81, 14.08, 10.52)),
              Row("D: 4_3 5_3 logit", "D", {"phase1.layers": "D"}, (2.62, 13.34, 9.56)),
              Row("sem: 5_3 logit", "sem", {"phase1.alpha": 1.0}, (2.77, 12.07, 8.84)),  # alpha = 1
              Row("E: logit", "E", {"phase1.layers": "E"}, (4.65, 17.88, 14.00))]),
    "fig5b": dict(
        title="Fig. 5b: the semantic ratio alpha (one phase; the paper's ends are those of Table 6)",
        columns=("rfid", "ar_fid", "nar_fid"), scale=SCALE,
        rows=[Row(f"alpha = {a}", f"alpha={a}", {"phase1.alpha": float(a)}, paper)
              for a, paper in ((0, (3.45, 16.97, 13.26)), *((a, (None,) * 3) for a in (0.2, 0.4, 0.6, 0.8)),
                               (1, (2.77, 12.07, 8.84)))]),
    "fig7b": dict(
        title="Fig. 7b: the same tokens decoded after phase 1 and after phase 2 (alpha = 1)",
        columns=("rfid", "ar_fid", "nar_fid"),
        scale="ImageNet 256x256, Tables 9 and 10 in full, Inception FID, 50,000",
        rows=[Row("phase 1", "sem", {"phase1.alpha": 1.0}, (None, 7.83, 5.31)),
              Row("phase 1 + 2", "sem", {"phase1.alpha": 1.0}, (1.99, 7.55, 4.99), "phase2")]),
}


def expand_ablation(name, config, further=()):
    """--ablation NAME as values of the preset: {"section.key": value}.

    further: rows of a fork's own tables;  raises: ValueError for a name that no row has
    """
    rows = {row.name: row.changes for table in (*TABLES.values(), *further) for row in table["rows"]}
    if name.startswith("alpha="):
        try:
            rows[name] = {"phase1.alpha": float(name.removeprefix("alpha="))}
        except ValueError:
            raise ValueError(f"--ablation {name}: expected alpha=NUMBER") from None
    if name not in rows:
        raise ValueError(f"--ablation {name}: not one of {', '.join(rows)} or alpha=NUMBER")
    changes = rows[name](config) if callable(rows[name]) else rows[name]
    if "phase1.alpha" in changes and config["phase1"]["layers"]:  # which alpha would not touch
        changes = changes | {"phase1.layers": None}
    return changes
