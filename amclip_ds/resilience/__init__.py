"""What keeps a run alive or ends it well: guards (bad numbers), preemption (signals), watchdog (hangs), owner."""
