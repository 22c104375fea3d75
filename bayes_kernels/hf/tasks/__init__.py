"""Texts with classes: tasks, their prompts, and models that give class logits for them."""
