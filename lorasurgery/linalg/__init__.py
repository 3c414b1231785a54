"""Linear algebra on the factors of adapters: numpy only, float64 inside, nothing known about files or models.

Notation of the field: ``up: (out, rank)``, ``down: (rank, in)``, ``delta = up @ down: (out, in)``.
"""
