"""The public surface: the names that the package and each of its rooms offer. A change here is one that users see."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.imports import public, rooms
from tests.test_architecture import INTERNAL, PACKAGE

SURFACE = {
    "__main__": """
        EXTRAS facts main self_test
    """,
    "": """
        AP CCL EnsembleKD EnsembleKDError fit ICL KD MaskedItem NextItem Recommendations Step
    """,
    "data": """
        AnySequences AtTime BatchPlan BlockPlan Cuts Holdout ItemAttributes left_padded MappedSequences MappedWindows
        Prefixes read_amazon read_movielens read_recbole read_text SequenceData Split synthetic Table Unknown Vocabulary
        write_sequences
    """,
    "distillation": """
        distill Distilled FromTeacher
    """,
    "distributed": """
        agree beside gather_members gather_objects gather_rows gather_states gathered mean_members own_moments
        own_shards own_states Place process_group reduced restarted same_draws shard shares SpreadLoss
        sum_members_ sum_rows whole
    """,
    "encoders": """
        BERT4Rec Caser from_huggingface GRU4Rec right_padded SASRec
    """,
    "ensemble": """
        Attributes check_attributes check_catalogue check_model_and_data check_output checksum choose_precision Chosen
        Classifier default_losses EnsembleKD fingerprint ItemLoss join learns_from_averages MeanTeachers Mutual Options
        Precision probe size_of Step Weighting without_addresses
    """,
    "errors": """
        EnsembleKDError first_line import_extra
    """,
    "evaluation": """
        calibrate Calibration calibration_error evaluate evaluate_popularity Evaluation Exclude held_out_states LONGEST
        protocol Quality table TILE_BYTES
    """,
    "export": """
        Card from_pretrained load push_to_hub save save_pretrained Scorer to_onnx to_program
    """,
    "functional": """
        ambiguity attribute_cross_entropy Contrast contrast item_cross_entropy kl_divergence knowledge_distillation
        mean_teacher_distillation moving_average Pool pool_sequence power_average target_distillation
        Variant
    """,
    "growing": """
        grow
    """,
    "losses": """
        Ambiguity AP attribute_losses Between CCL compile_status distillation_losses Gate ICL item_losses ItemLosses KD
        Loss LossName LossSum mean_teacher_losses Need Networks On Part sampled_item_losses scale_transfer Spread
        Teacher Term terms_by_name Weight weighted
    """,
    "metrics": """
        CUTOFFS disagreement hit_rate metric_named metric_row METRICS mrr ndcg ranks
    """,
    "objectives": """
        Candidates Draw draw_candidates mask_positions MaskedItem NextItem Objective places selects splice
    """,
    "plots": """
        calibration curves members minutes overlap Picture recommendations
    """,
    "presets": """
        paper PAPER_FIT Recipe recipe RELATIVE_BLOCK strong_kd STRONG_KD_FIT WARM_FIT
    """,
    "recommending": """
        NamedRecommendations recommend recommend_all recommend_for
    """,
    "serving": """
        Aggregate aggregate_scores BLOCK_BYTES encoded ENCODER_BYTES item_vectors mean_logits query_vectors
        Recommendations top_items Uncertainty uncertainty
    """,
    "stacking": """
        Backend build_members check_members check_modules duplicate Factories factories_of form_of Heads item_rows
        MixedModule share_table sparse_lookups stack StackedModule take_rows
    """,
    "testing": """
        Check check_encoder Report
    """,
    "training": """
        best_device Callback clip_members_ Cosine fit FitResult Hump Metric Ramp RowAdamW Schedule StepDecay
        WarmupStableAverage
    """,
}


@pytest.mark.parametrize("room", SURFACE)
def test_the_public_names(room: str) -> None:
    assert public(PACKAGE, room) == set(SURFACE[room].split())
    module = import_module(f"ensemble_kd.{room}".rstrip("."))
    assert [name for name in SURFACE[room].split() if not hasattr(module, name)] == []


def test_no_room_is_left_out() -> None:
    assert SURFACE.keys() == {"", *rooms(PACKAGE)} - INTERNAL
