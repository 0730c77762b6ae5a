"""Published protocols: UCF-101, MSR-VTT, VBench."""
