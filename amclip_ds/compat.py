"""What `compat` means, in one place: where published code does another thing than its paper says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Compat:
    pairs_views: bool
    """Online-to-online compares a view with the other one; False: with itself."""
    teacher_sees_views: bool
    """The teacher's crop contains every view; False: part of a view is outside in about 7 of 10 samples."""
    gathers_gradient: bool
    """SLIP's contrastive loss has the gathered columns' gradient; False: on several ranks it has not."""
    averages_text_ends: bool
    """The teacher averages its whole text tower; False: token embedding, positions and last norm are the student's."""
    fills_text_budget: bool
    """Frequency text masks keep whole words until the budget is full; False: as many words as it has tokens, cut."""


TEXT_ENDS = ("text.embeddings.", "text.final_layer_norm.")
"""of the names of what the teacher does not average where it does not average its whole text tower"""
COMPAT = {"paper": Compat(True, True, True, True, True), "release": Compat(False, False, False, False, False)}
