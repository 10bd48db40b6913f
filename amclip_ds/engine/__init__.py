"""The engines: student and teacher through DeepSpeed, which only this package and two modules of ranks/ import."""
