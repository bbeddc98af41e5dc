"""What each technique did on the sample data: the guide's tables and pictures.

python -m benchmarks.techniques run --out RUNS --jobs 2          # every variant, hours on 2 cores
python -m benchmarks.techniques run --out RUNS --only clip-none --seeds 0 1
python -m benchmarks.techniques collect RUNS ...                 # into results/techniques.json
python -m benchmarks.techniques tables                           # from there into docs/guide/
python -m benchmarks.techniques pictures                         # into docs/pictures/guide/
"""
