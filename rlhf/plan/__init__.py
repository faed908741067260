"""What a run needs, from its settings alone: bytes per rank, seconds. Never imports torch.

shapes (a model's numbers) <- read, known, gguf (where they come from) ; memory, time (what follows)
; advise (what to change) ; report (lines for people). How far off it is: benchmarks/plan.py.
"""
