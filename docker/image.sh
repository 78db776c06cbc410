#!/usr/bin/env bash
# The image with docker, podman or buildah, whichever is there. Run as: docker/image.sh build|run|tag [cuda|cpu] [COMMAND ...]
# or: eval "$(docker/image.sh mounts)", which makes the directories that compose mounts, and exports who owns them.
# From the environment: ENGINE=docker|podman|buildah; build: BASE, TORCH_INDEX, DEBIAN_SNAPSHOT, MARCH, TORCH_CUDA_ARCH_LIST,
# BUILD_FLAGS; run: IMAGE (one from a registry), NVME, RUNS, CACHE, DATA (directories of the host; relative ones are the checkout's),
# ENV_FILE, RUN_FLAGS (buildah: FROM_FLAGS too).
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}
target=${2:-cuda}
case $what/$target in
  build/c* | run/c* | tag/c* | mounts/c*) [ "$target" = cpu ] || [ "$target" = cuda ] || what= ;;
  *) what= ;;
esac
if [ -z "$what" ]; then
  printf 'error: docker/image.sh %s\n  needed: build, run or tag, then cuda or cpu; or mounts\n' "$*" >&2
  exit 2
fi
shift $(($# < 2 ? $# : 2))

# The tag carries what decides whether it fits a machine: the product's version, torch's and CUDA's.
version=$(sed -n 's/^ *version="\(.*\)",/\1/p' setup.py)
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
index=${TORCH_INDEX:-}
# PyPI's build of that torch is for CUDA 13.0; another index names its own.
cuda=$(sed -n 's|.*/\(cu[0-9]*\)/*$|\1|p' <<<"$index")
[ "$target" = cpu ] && build=cpu || build=${cuda:-cu130}
image=zero-offload-trainer:$version-torch$torch-$build

refuse() {  # WHAT FOUND NEEDED FIX CODE
  printf 'error: %s\n  found:  %s\n  needed: %s\n  fix:    %s\n' "${@:1:4}" >&2
  exit "$5"
}

choose_engine() {
  local name silent='' found fix
  engine=${ENGINE:-}
  for name in docker podman buildah; do
    if [ -n "$engine" ] || ! command -v "$name" >/dev/null; then continue; fi
    # A client alone builds nothing: another engine may be there.
    if [ "$name" = docker ] && ! docker info >/dev/null 2>&1; then silent=docker; else engine=$name; fi
  done
  # Debian's podman-docker answers to the name, and takes other flags.
  [ "$engine" != docker ] || [[ $(docker --version 2>/dev/null) != podman* ]] || engine=podman
  if ! command -v "${engine:-none}" >/dev/null; then
    found=${engine:+no $engine} fix='apt-get install podman, or docker.io, or buildah'
    if [ -n "$silent" ] && [ -z "$engine" ]; then
      found='docker, and no daemon that answers this user'
      fix='start it (systemctl start docker), or join its group (usermod -aG docker YOU, then log in again); docker info says more'
    fi
    refuse "no container engine" "${found:-none}" "docker, podman or buildah" "$fix" 3
  fi
}

build() {
  choose_engine
  if [ "$engine" = docker ] && ! docker buildx version >/dev/null 2>&1; then
    refuse "docker cannot build it" "no buildx" "BuildKit: the older builder builds every stage, CUDA's too" \
      "apt-get install docker-buildx (Docker's own packages: docker-buildx-plugin)" 3
  fi
  local label=org.opencontainers.image base=${BASE:-$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)}
  local flags=(--target "$target" --tag "$image" --file docker/Dockerfile
    --label "$label.version=$version" --label "$label.revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)"
    --label "$label.created=$(date -u +%Y-%m-%dT%H:%M:%SZ)" --label "$label.base.name=${base%@*}")
  [ "${base%@*}" = "$base" ] || flags+=(--label "$label.base.digest=${base#*@}")
  local name
  for name in BASE TORCH_INDEX DEBIAN_SNAPSHOT MARCH TORCH_CUDA_ARCH_LIST PIP_FIND_LINKS PIP_CERT; do
    [ -z "${!name+x}" ] || flags+=(--build-arg "$name=${!name}")
  done
  [ "$engine" = docker ] || flags+=(--layers --format docker)  # HEALTHCHECK is of the docker format
  export DOCKER_BUILDKIT=1
  # shellcheck disable=SC2086
  (set -x; "$engine" ${STORAGE_FLAGS:-} build "${flags[@]}" ${BUILD_FLAGS:-} .)
  echo "$image"
}

# podman's and buildah's filter of system calls forbids one of libaio's, and DeepSpeed then asks for its results for ever: their filter
# with this call, as docker's has it. In a directory that no container has.
security=()
filter() {
  local theirs=/etc/containers/seccomp.json home=${XDG_CACHE_HOME:-$HOME/.cache}
  local ours=$home/zero-offload-seccomp.json
  [ -e "$theirs" ] || theirs=/usr/share/containers/seccomp.json
  [ -e "$theirs" ] || return 0
  mkdir -p "$home"
  sed '/"io_pgetevents",/d; s/"io_getevents",/& "io_pgetevents",/' "$theirs" >"$ours.$$"
  mv "$ours.$$" "$ours"
  security=(--security-opt "seccomp=$ours")
}

# buildah has no run of an image: a working container in its place, for trials and tests: no GPU, and /dev/shm is the host's. It raises
# no limit beyond the hard one of this shell, so that where memory cannot be locked without end the user gets the right to lock in place
# of the limit.
run_buildah() {
  local files container flags=() as=() limits
  files=$(ulimit -Hn)
  [ "$files" != unlimited ] && [ "$files" -lt 65536 ] || files=65536
  limits="--ulimit nofile=$files:$files"
  if [ -n "${FROM_FLAGS:-}" ]; then
    limits+=" $FROM_FLAGS"
  elif [ "$(ulimit -Hl)" != unlimited ]; then
    flags=(--user 0:0 --cap-add CAP_IPC_LOCK)
    as=(/usr/bin/setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=+ipc_lock --ambient-caps=+ipc_lock --no-new-privs --)
  else
    limits+=" --ulimit memlock=-1:-1"
  fi
  # shellcheck disable=SC2086
  container=$(buildah ${STORAGE_FLAGS:-} from --pull-never "${security[@]}" $limits "${IMAGE:-localhost/$image}")
  # shellcheck disable=SC2064
  trap "buildah ${STORAGE_FLAGS:-} rm $container >/dev/null" EXIT
  [ -z "${ENV_FILE:-}" ] || echo "warning: buildah has no --env-file: $ENV_FILE stays outside" >&2
  while [ "$1" != -- ]; do flags+=("$1"); shift; done
  shift
  # shellcheck disable=SC2086
  buildah ${STORAGE_FLAGS:-} run --isolation "${ISOLATION:-chroot}" "${flags[@]}" ${RUN_FLAGS:-} "$container" -- "${as[@]}" "$@"
}

# What a mount lacks, the daemon would make as root. It belongs to who started it; where that is root, to the image's own user, 1000.
mounts() {
  local folder
  for folder in "$runs" "$nvme" "$cache"; do
    [ -e "$folder" ] || { mkdir -p "$folder"; [ "$(id -u)" != 0 ] || chown 1000:1000 "$folder"; }
  done
}

run() {
  choose_engine
  if [ "$engine" = buildah ] && [ "$(id -u)" != 0 ]; then
    refuse "buildah runs the image as root only" "user $(id -u)" "docker or podman" "apt-get install podman" 3
  fi
  local known=(image inspect)
  [ "$engine" != buildah ] || known=(inspect --type image)
  # shellcheck disable=SC2086
  if [ -z "${IMAGE:-}" ] && ! "$engine" ${STORAGE_FLAGS:-} "${known[@]}" "$image" >/dev/null 2>&1; then
    refuse "the image is not there" "no $image with $engine" "one that is built, or one of a registry" \
      "make docker-build TARGET=$target, or IMAGE=REGISTRY/NAME:TAG" 3
  fi
  mounts
  [ "$engine" = docker ] || filter
  local flags=(
    --volume "$(realpath "$runs"):/app/runs"  # checkpoints and results stay on the host
    --volume "$(realpath "$nvme"):/app/.swap"  # swap files: a local NVMe, not the image's overlay, which has no O_DIRECT everywhere
    --volume "$(realpath "$cache"):/cache"  # models, tokenised data and compiled kernels live longer than a container
  )
  if [ -n "${DATA:-}" ] && [ ! -d "$DATA" ]; then
    refuse "DATA is not a directory of this machine" "$DATA" "a folder, which is /data inside" \
      "DATA=FOLDER, and --dataset /data/FILE in CMD; other addresses go to --dataset alone" 2
  fi
  if [ -n "${ENV_FILE:-}" ] && [ ! -f "$ENV_FILE" ]; then
    refuse "ENV_FILE is not a file" "$ENV_FILE" "lines NAME=value" "install -m 600 /dev/null $ENV_FILE, and fill it; none: ENV_FILE=" 2
  fi
  [ -n "${ENV_FILE+x}" ] || [ ! -e .env ] || ENV_FILE=.env
  [ -z "${DATA:-}" ] || flags+=(--volume "$(realpath "$DATA"):/data:ro")  # your rows, read only
  [ "$(id -u)" = 0 ] || flags+=(--user "$(id -u):$(id -g)")
  local locked=memlock=-1:-1
  if [ "$engine" = podman ] && [ "$(id -u)" != 0 ]; then
    flags+=(--userns keep-id)  # else the mounts belong to root inside
    [ "$(ulimit -Hl)" = unlimited ] || locked=host  # nobody but root raises a hard limit; the doctor says if it is too low
  fi
  if [ "$engine" = buildah ]; then
    [ $# -gt 0 ] || set -- python launch/doctor.py
    run_buildah "${flags[@]}" -- /usr/bin/tini -s -g -- "$@"
    return
  fi
  flags+=(
    --shm-size 8g  # NCCL, gloo and the data loader exchange through it; 64 MB is the default
    --ulimit "$locked"  # buffers for PCIe and NVMe are locked in RAM
    --ulimit nofile=65536:65536  # a swap file a tensor, shards, sockets
    --stop-timeout 600  # a stop ends the run after its optimizer step, with a checkpoint
    --cap-drop ALL --security-opt no-new-privileges  # it needs none
    "${security[@]}"
  )
  if [ "$target" = cuda ]; then
    [ "$engine" = docker ] && flags+=(--gpus all) || flags+=(--device nvidia.com/gpu=all)
  fi
  [ -z "${ENV_FILE:-}" ] || flags+=(--env-file "$ENV_FILE")  # HF_TOKEN, WANDB_API_KEY: never in the image, never in YAML
  # One in the background stays when it has ended: its output and exit code are still asked for. A log has no use for a terminal.
  if [[ ! " ${RUN_FLAGS:-} " =~ " "(--detach|-d)" " ]]; then
    flags+=(--rm)
    [ ! -t 0 ] || flags+=(--interactive --tty)
  fi
  # shellcheck disable=SC2086
  (set -x; exec "$engine" run "${flags[@]}" ${RUN_FLAGS:-} "${IMAGE:-$image}" "$@")
}

runs=${RUNS:-runs} nvme=${NVME:-.swap} cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/zero-offload-image}
case $what in
  build) build ;;
  mounts)
    mounts
    [ "$(id -u)" = 0 ] || echo "export USER_ID=$(id -u) GROUP_ID=$(id -g)"
    ;;
  run) run "$@" ;;
  tag) echo "$image" ;;
esac
