"""What `make demo` needs beside the stages: a small model of openPangu's architecture, and the order of the stages."""
