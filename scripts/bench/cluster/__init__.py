"""hybridpar beside its peers on several hosts with slow links between them; see docs/benchmarks.md."""
