"""What a configuration takes, before anything is allocated: memory, floating point operations, time. Loads no torch,
unless a part has to be built to be counted (an objective of a plug-in, a tower whose shape only timm knows)."""
