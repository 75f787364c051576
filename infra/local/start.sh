#!/usr/bin/env bash
# A cluster on this machine until Ctrl-C: a Ray head that asks for a token, and an S3 server whose photos stay.
#
#     infra/local/start.sh [FOLDER]       in one terminal; FOLDER is by default `local-cluster`
#     . local-cluster/environment         in others: leads fruitray, `ray job submit` and `aws s3` there
#
# The S3 server and Ray's dashboard listen on loopback. Ray itself listens on every interface, whatever it is told: the
# token keeps others out. The S3 server's other ports ask for no key, so whoever has an account on this machine can read
# what is in it. Ports: GCS_PORT, DASHBOARD_PORT (and the next three), S3_PORT (and the next seven).
set -euo pipefail
umask 077

host=127.0.0.1
gcs=${GCS_PORT:-6379} dashboard=${DASHBOARD_PORT:-8265} s3=${S3_PORT:-28333} bucket=${BUCKET:-fruit}
for program in python ray weed; do
    command -v "$program" > /dev/null && continue
    echo "start.sh: there is no \`$program\`; first run: make install; . .venv/bin/activate" >&2
    exit 2
done
for port in "$gcs" "$dashboard" "$s3"; do
    (exec 3<> "/dev/tcp/$host/$port") 2> /dev/null || continue
    echo "start.sh: port $port is taken; choose others by GCS_PORT, DASHBOARD_PORT and S3_PORT" >&2
    exit 1
done
mkdir -p "${1:-local-cluster}/s3"
cd "${1:-local-cluster}"

echo '*' > .gitignore    # nor does Ray upload any of it with a working directory
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
[ -s token ] || random 32 > token
[ -s keys ] || echo "$(random 10) $(random 20)" > keys
read -r access secret < keys
cat > s3.json << END
{"identities": [{"name": "fruitray", "credentials": [{"accessKey": "$access", "secretKey": "$secret"}],
                 "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}
END
cat > environment << END
unset AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_PROFILE AWS_DEFAULT_PROFILE AWS_ENDPOINT_URL_S3 RAY_AUTH_TOKEN
export AWS_ACCESS_KEY_ID=$access AWS_SECRET_ACCESS_KEY=$secret AWS_REGION=us-east-1 AWS_DEFAULT_REGION=us-east-1
export AWS_ENDPOINT_URL=http://$host:$s3 AWS_EC2_METADATA_DISABLED=true
export NO_PROXY=\${NO_PROXY:+\$NO_PROXY,}$host no_proxy=\${no_proxy:+\$no_proxy,}$host
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$(printf %q "$PWD/token") RAY_USAGE_STATS_ENABLED=0
export RAY_ADDRESS=$host:$gcs RAY_API_SERVER_ADDRESS=http://$host:$dashboard
END
. ./environment

options=() sockets=() port=$s3
for part in s3 filer volume master; do
    options+=("-$part.port=$port" "-$part.port.grpc=$((port + 1))")
    sockets+=("/tmp/seaweedfs-$part-grpc-$((port + 1)).sock")    # it puts them there whatever TMPDIR says, and leaves them
    port=$((port + 2))
done
ended() {
    trap - EXIT
    kill "$ray" 2> /dev/null || true
    kill -9 "$weed" 2> /dev/null || true    # while it starts it heeds no other; what it has stored is on disk
    wait || true
    rm -f "${sockets[@]}"
}
ray='' weed=''
trap ended EXIT
trap 'exit 0' INT TERM

weed -logtostderr=true server -dir=s3 -ip=$host -ip.bind=$host -master.peers=none -master.telemetry=false \
    -master.volumeSizeLimitMB=1024 -volume.max=100 -filer -filer.localSocket=filer.sock -s3 -s3.config=s3.json \
    -s3.localSocket=s3.sock -s3.port.iceberg=0 -s3.port.lance=0 "${options[@]}" > s3.log 2>&1 &
weed=$!
env -u RAY_ADDRESS RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 ray start --head --block --port="$gcs" --node-ip-address=$host --dashboard-host=$host \
    --dashboard-port="$dashboard" --dashboard-agent-listen-port=$((dashboard + 1)) \
    --dashboard-agent-grpc-port=$((dashboard + 2)) --metrics-export-port=$((dashboard + 3)) > ray.log 2>&1 &
ray=$!

until python -c "import boto3; boto3.client('s3').create_bucket(Bucket='$bucket')" 2> s3-client.log ||
    grep -q BucketAlready s3-client.log; do
    kill -0 $weed 2> /dev/null || { echo "start.sh: the S3 server did not start; see $PWD/s3.log" >&2; exit 1; }
    [ $SECONDS -lt 300 ] || { echo "start.sh: there is no bucket $bucket; see $PWD/s3-client.log" >&2; exit 1; }
    sleep 0.5
done
until RAY_ADDRESS=http://$host:$dashboard ray job list > /dev/null 2>&1; do
    kill -0 $ray 2> /dev/null || { echo "start.sh: Ray did not start; see $PWD/ray.log" >&2; exit 1; }
    sleep 0.5
done
echo "start.sh: ready; s3://$bucket is there. In another terminal: . $(printf %q "$PWD/environment")"
wait -n
echo "start.sh: one of the two ended; see $PWD/ray.log and s3.log" >&2
exit 1
