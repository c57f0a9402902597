"""What is wrong with a mesh or soon will be, why that matters, and the command that mends it.

``gather`` looks and asks; what it found are plain facts; ``checks`` are functions of the facts and nothing else.
"""
