"""What a recipe needs besides data: words for those that name a key of their own."""

NEEDS = {
    "clipkd": ["distill.teacher=a-finished-run"],
    "flip-tune": ["model.init_from=a-finished-run"],
    "clipa-tune": ["model.init_from=a-finished-run"],
    "frequency": ["data.text_mask.table=words.json"],
}


def words_of(recipe: str) -> list[str]:
    """Of METHOD or METHOD-SIZE."""
    return next((words for method, words in NEEDS.items() if recipe == method or recipe.startswith(f"{method}-")), [])
