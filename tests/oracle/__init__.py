"""What the tests compare with: plain computations that share no code with factscope."""
