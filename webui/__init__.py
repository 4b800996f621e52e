"""Web UI face of the pack: Automatic1111, Forge, Forge Neo and reForge.

A prompt's tags (`tags`) name files (`files`); before the prompt is encoded, `activation` finds each file's layers on the
loaded model and hands them to the host (`hosts`, one file a host), as rotations that act on a weight (`changes`).
Beside them: `settings`, `infotext`, `page` (cards), `api`, `xyz`, `tab`. No mathematics lives here; see `oft_core`.
"""
