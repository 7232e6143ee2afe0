"""Environments such as launchers really leave to their processes, by launcher."""

from __future__ import annotations

# python -m torch.distributed.run --nproc-per-node 4 train.py, and the same with --nnodes 2 --node-rank 1
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "3",
    "ROLE_RANK": "3",
    "GROUP_RANK": "0",
    "ROLE_NAME": "default",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "ROLE_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
    "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_x/none_y/attempt_2/3/error.json",
    "OMP_NUM_THREADS": "1",
}
TORCHRUN_ON_TWO_NODES = TORCHRUN | {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "8",
    "ROLE_WORLD_SIZE": "8",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node001",
}
# the job's own, which every process in it has
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOBID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NODELIST": "node[001-002]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_SUBMIT_DIR": "/home/ada",
    "SLURM_SUBMIT_HOST": "login1",
    "HOSTNAME": "login1",
}
# the script that sbatch runs, on the first node
JOB_SCRIPT = SBATCH | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
    "SLURM_TASK_PID": "1381",
    "SLURMD_NODENAME": "node001",
    "ENVIRONMENT": "BATCH",
}
# srun python train.py
SRUN = SBATCH | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GTIDS": "4,5,6,7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURMD_NODENAME": "node002",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.205.134",
    "SLURM_SRUN_COMM_HOST": "10.0.205.134",
}
# srun --ntasks-per-node=1 torchrun, or ray start, or the daemons of mpirun: a task per node, that starts processes
SRUN_PER_NODE = SRUN | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GTIDS": "1",
}
OPENMPI_4 = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "8",
    "OMPI_MCA_ess_base_jobid": "3345154049",
    "OMPI_MCA_ess_base_vpid": "5",
    "OMPI_MCA_orte_num_nodes": "2",
    "PMIX_NAMESPACE": "3345154049",
    "PMIX_RANK": "5",
    "PMIX_HOSTNAME": "node002",
}
OPENMPI_5 = {name: value for name, value in OPENMPI_4.items() if not name.startswith("OMPI_MCA")} | {
    "PMIX_NAMESPACE": "prterun-node001-31337@1",
}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "5",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PBS_JOBID": "99.pbs",
}
HYDRA = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_FD": "9",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
    "HYDI_CONTROL_FD": "6",
    "PBS_JOBID": "99.pbs",
}
PALS = {
    "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1",
    "PALS_NODEID": "1",
    "PALS_DEPTH": "1",
    "PALS_APID": "b0f2b9a2-6a2f-4c1a-a6c3-1f1f6f5d2c11",
    "PALS_SPOOL_DIR": "/var/run/palsd/b0f2b9a2-6a2f-4c1a-a6c3-1f1f6f5d2c11",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "4",
    "PMI_JOBID": "b0f2b9a2",
    "PBS_JOBID": "99.pbs",
}
FLUX = {
    "FLUX_TASK_RANK": "5",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_SIZE": "8",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "f3dSybfQ3",
    "FLUX_KVS_NAMESPACE": "job-3221225472",
    "FLUX_URI": "local:///tmp/flux-x/local-0",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_FD": "20",
}
JSM = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "3",
    "PMIX_RANK": "5",
    "LSB_JOBID": "1234",
    "LSB_HOSTS": "batch1 h01 h01 h02 h02",
}
PRRTE = {"PMIX_RANK": "5", "PMIX_NAMESPACE": "prterun-node001-31337@1", "PMIX_HOSTNAME": "node002"}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PMI_JOBID": "77"}
# torch.distributed of Ray Train's TorchTrainer, in an actor
RAY_TRAIN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "NODE_RANK": "1",
    "MASTER_ADDR": "10.0.0.5",
    "MASTER_PORT": "42137",
    "ACCELERATE_TORCH_DEVICE": "cuda:1",
    "RAY_JOB_ID": "02000000",
}
# a Kubeflow PyTorchJob of one process per pod
KUBEFLOW = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "train-master-0",
    "MASTER_PORT": "23456",
    "PET_NNODES": "8",
    "PET_NODE_RANK": "5",
    "HOSTNAME": "train-worker-4",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}
INDEXED_JOB = {
    "JOB_COMPLETION_INDEX": "5",
    "HOSTNAME": "train-5",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}
# a subprocess of lightning's on the first node
LIGHTNING = {
    "LOCAL_RANK": "3",
    "NODE_RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "51234",
}
