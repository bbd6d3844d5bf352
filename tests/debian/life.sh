# What the lives under systemd and sysvinit have in common.
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
data=/var/lib/cassandra/data bucket=/srv/bucket
table=$data/ks1/users-5a1c395e8b3e11ecbd3d0242ac130003

say() { echo "== $*"; }

until_true() { # wait two minutes at most for a command to succeed
    for _ in $(seq 240); do
        if "$@"; then return 0; fi
        sleep 0.5
    done
    echo "waited in vain for: $*"
    return 1
}

fails_with() { # fails_with CODE COMMAND ...
    local want=$1 code=0
    shift
    "$@" || code=$?
    [ "$code" = "$want" ]
}

install_debs() { dpkg -i "/root/$1"/*.deb; }

make_node() {
    install -d -o cassandra -g cassandra -m 750 /var/lib/cassandra "$data" "$bucket" "$data/system" "$data/ks1" "$table"
    usermod --home /var/lib/cassandra cassandra 2>/dev/null || true
}

# storm TAG: a snapshot of a hundred SSTables: 402 files
storm() {
    setpriv --reuid cassandra --regid cassandra --clear-groups sh -eu <<SH
mkdir -p $table/snapshots
cd $table
names=
for n in \$(seq 100); do
    for component in Data.db Index.db Statistics.db; do
        head -c 2000 /dev/urandom >nb-$1\$n-big-\$component
    done
    printf 'Data.db\nIndex.db\nStatistics.db\nTOC.txt\n' >nb-$1\$n-big-TOC.txt
    names="\$names,\"nb-$1\$n-big-Data.db\""
done
mkdir snapshots/$1
ln nb-$1*-big-* snapshots/$1/
printf '{"files":[%s]}' "\${names#,}" >snapshots/$1/manifest.json
echo 'CREATE TABLE ks1.users (id int PRIMARY KEY);' >snapshots/$1/schema.cql
SH
}

is_stored() { # is_stored TAG: its listing says complete
    find "$bucket" -path "*.listings/ks1/users-*/snapshots/$1/*-complete-402-*" | grep -q .
}

pins() { # pins [TAG]: how many files wait, wherever
    find /var/lib/cassandra/.cassbackup /var/lib/cassandra/pins "$data/.cassbackup" -type f -path "*${1:-}~*/*~" \
        -print 2>/dev/null | wc -l
}
no_pins() { [ "$(pins)" = 0 ]; }
