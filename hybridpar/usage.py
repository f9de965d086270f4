"""What ``hybridpar --help`` prints."""

USAGE = """usage: hybridpar COMMAND [GROUP=CHOICE | KEY=VALUE ...]

commands
  plan      print what would run where, how fast, in how much memory, and why; needs no GPU
  plan -m   the same for every combination of KEY=A,B ..., as one table
  train     train; under torchrun, one process per rank: torchrun --nproc-per-node 4 -m hybridpar train ...
  verify    compare two steps of train, layer by layer, with a single process; overrides and launch as of train;
            exit code 1 where they differ
  profile   measure time and memory of every layer on this machine and write them to out=FILE; under torchrun on
            all ranks at once; occupancy=true batches=[4,16,64]: also how busy and how full the device is
  probe     measure the links between the processes of a job and write the cluster to probe.out;
            torchrun --nproc-per-node 4 -m hybridpar probe
  report    lay what was predicted of runs over what was measured, action by action, and advise what to change:
            report RUN [RUN2 ...] [out=report.html] [pictures=FOLDER] [advice=false]
  monitor   show what a run does until it ends: stages, busy and occupancy bars, step time, advice:
            monitor RUN [every=SECONDS] [once=true]
  export    write a checkpoint as a plain state dict: export RUN_OR_CHECKPOINT out=model.safetensors (or .pt)
  doctor    what is installed, what a job would run on, and what is wrong, with remedies; under torchrun also
            whether its ranks reach each other; exit code 1 where something is wrong
  config    print the resolved configuration

examples
  hybridpar plan model=vgg16 cluster=p100_4x1_40g train.global_batch=64
  hybridpar plan plan=three_stage plan.tail.micro_batch=64 format=json out=plan.json
  hybridpar plan model=vgg16 cluster=v100_2x8 train.global_batch=256 pictures=pictures/
  hybridpar plan profile=from_file profile.path=profile.json cluster=v100_2x8
  hybridpar plan model=vgg16 explain=true diff=plan.json
  hybridpar plan model=vgg16 cluster=v100_2x8 plan.global_batch_range=[32,512]
  hybridpar plan -m model=vgg16 cluster=p100_4x1_40g,v100_2x8 train.global_batch=64,128

groups: model profile cluster plan data optimizer train monitor experiment; see the README and conf/
"""
