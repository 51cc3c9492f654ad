"""MobileNet v1 behind several systems: latency and throughput by the ratio of cold starts."""
