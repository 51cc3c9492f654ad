"""What the Redis server does by itself, each script at once. KEYS[1] is the namespace or a key's prefix.

A key has the hash `:m` (id, version, declaration, the writers' last commits), the set `:n` (the order in which
the writers committed; the oldest are forgotten), the chunks `:c:N` of its value
and `:a:N` of its log, the merge mutex `:x`, and `:w`, `:r`, `:q`: the write lock, the read locks, and a writer
that waits. A script that would fail does so before its first write, because Redis takes nothing back.
"""

OPEN = """
local made = redis.call('EXISTS', KEYS[1]) == 0
if not made and ARGV[1] == '1' then
  local found = redis.call('HMGET', KEYS[1], 'owner', 'keys', 'bytes')
  return {0, found[1], found[2], found[3]}
end
if made then
  redis.call('HSET', KEYS[1], 'id', ARGV[6], 'owner', ARGV[2], 'keys', 0, 'bytes', 0)
  redis.call('HSET', KEYS[1], 'most_keys', ARGV[3], 'most_bytes', ARGV[4])
  redis.call('SADD', KEYS[2], ARGV[5])
end
return {1, redis.call('HGET', KEYS[1], 'id')}
"""

#: ARGV: key, its prefix, id, declaration, bytes, the namespace's id.
DECLARE = """
if redis.call('HGET', KEYS[1], 'id') ~= ARGV[6] then return {'gone'} end
local meta = ARGV[2] .. ':m'
if redis.call('EXISTS', meta) == 1 then
  local found = redis.call('HMGET', meta, 'info', 'appended')
  return {'is', found[1], found[2]}
end
local found = redis.call('HMGET', KEYS[1], 'keys', 'bytes', 'most_keys', 'most_bytes')
if found[1] + 1 > tonumber(found[3]) or found[2] + ARGV[5] > tonumber(found[4]) then
  return {'limit', found[1], found[2], found[3], found[4]}
end
redis.call('HINCRBY', KEYS[1], 'keys', 1)
redis.call('HINCRBY', KEYS[1], 'bytes', ARGV[5])
redis.call('SADD', KEYS[1] .. ':keys', ARGV[1])
redis.call('HSET', meta, 'info', ARGV[4], 'id', ARGV[3], 'nbytes', ARGV[5])
redis.call('HSET', meta, 'appended', 0, 'version', ARGV[3], 'cleared', 0, 'fence', 0)
return {'is', ARGV[4], '0'}
"""

#: ARGV: id, merge token, lock token, writer, number, prefix of what is staged, kind and number of each chunk.
#: A chunk of kind F is replaced; one of kind P has ranges: their number, start and length of each, the bytes;
#: one of kind M has the bytes amid zeros, and under ':k' a mask of the bits that stay.
COMMIT = """
local p = KEYS[1]
if redis.call('HGET', p .. ':m', 'id') ~= ARGV[1] then return 'gone' end
local field = 'writer:' .. ARGV[4]
if tonumber(redis.call('HGET', p .. ':m', field) or '0') >= tonumber(ARGV[5]) then return 'done' end
local holder = redis.call('GET', p .. ':x')
if ARGV[2] ~= '' then
  if holder ~= ARGV[2] then return 'lost' end
elseif holder then
  return 'busy'
end
if ARGV[3] ~= '0' and redis.call('GET', p .. ':w') ~= ARGV[3] then return 'unlocked' end
for i = 7, #ARGV, 2 do
  local staged = ARGV[6] .. ARGV[i + 1]
  if redis.call('EXISTS', staged) == 0 then return 'missing' end
  if ARGV[i] == 'M' and redis.call('EXISTS', staged .. ':k') == 0 then return 'missing' end
end
for i = 7, #ARGV, 2 do
  local chunk, staged = p .. ':c:' .. ARGV[i + 1], ARGV[6] .. ARGV[i + 1]
  if ARGV[i] == 'F' then
    redis.call('RENAME', staged, chunk)
    redis.call('PERSIST', chunk)
  elseif ARGV[i] == 'M' then
    redis.call('BITOP', 'AND', chunk, chunk, staged .. ':k')
    redis.call('BITOP', 'OR', chunk, chunk, staged)
    redis.call('UNLINK', staged, staged .. ':k')
  else
    local blob = redis.call('GET', staged)
    local count, at = struct.unpack('<I4', blob)
    local from = at + 8 * count
    for _ = 1, count do
      local start, length
      start, length, at = struct.unpack('<I4I4', blob, at)
      redis.call('SETRANGE', chunk, start, string.sub(blob, from, from + length - 1))
      from = from + length
    end
    redis.call('UNLINK', staged)
  end
end
local order = redis.call('HINCRBY', p .. ':m', 'commits', 1)
local replaced = redis.call('HGET', p .. ':m', 'version')
redis.call('HSET', p .. ':m', field, ARGV[5], 'version', ARGV[4] .. ':' .. ARGV[5])
redis.call('ZADD', p .. ':n', order, ARGV[4])
if redis.call('ZCARD', p .. ':n') > 1000 then
  redis.call('HDEL', p .. ':m', 'writer:' .. redis.call('ZPOPMIN', p .. ':n')[1])
end
return 'ok ' .. replaced
"""

#: ARGV: id, bytes of a chunk, data, lock token. KEYS[2] is the namespace.
APPEND = """
local p, size, data = KEYS[1], tonumber(ARGV[2]), ARGV[3]
if redis.call('HGET', p .. ':m', 'id') ~= ARGV[1] then return {'gone'} end
if ARGV[4] ~= '0' and redis.call('GET', p .. ':w') ~= ARGV[4] then return {'unlocked'} end
local found = redis.call('HMGET', KEYS[2], 'keys', 'bytes', 'most_keys', 'most_bytes')
if found[2] + #data > tonumber(found[4]) then return {'limit', found[1], found[2], found[3], found[4]} end
local at, done = tonumber(redis.call('HGET', p .. ':m', 'appended')), 0
while done < #data do
  local part = string.sub(data, done + 1, done + size - at % size)
  redis.call('SETRANGE', p .. ':a:' .. math.floor(at / size), at % size, part)
  at, done = at + #part, done + #part
end
redis.call('HSET', p .. ':m', 'appended', at)
redis.call('HINCRBY', KEYS[2], 'bytes', #data)
return {'ok'}
"""

#: ARGV: id ('' for any), bytes of a chunk, what goes (log, values or key), the key, the namespace's id, a new
#: version. KEYS[2] is the namespace. What frees memory comes first: without any, Redis refuses the rest.
#: Values go with the merge mutex, so a push that has read them begins again.
REMOVE = """
local p, size = KEYS[1], tonumber(ARGV[2])
local found = redis.call('HMGET', p .. ':m', 'id', 'nbytes', 'appended')
if (redis.call('HGET', KEYS[2], 'id') or '') ~= ARGV[5] then return 'gone' end
if not found[1] then redis.call('SREM', KEYS[2] .. ':keys', ARGV[4]) end
if not found[1] or (ARGV[1] ~= '' and found[1] ~= ARGV[1]) then return 'gone' end
for i = 0, math.ceil(found[3] / size) - 1 do redis.call('UNLINK', p .. ':a:' .. i) end
if ARGV[3] ~= 'log' then
  redis.call('UNLINK', p .. ':x')
  for i = 0, math.ceil(found[2] / size) - 1 do redis.call('UNLINK', p .. ':c:' .. i) end
end
if ARGV[3] == 'key' then
  redis.call('UNLINK', p .. ':m', p .. ':n', p .. ':w', p .. ':r', p .. ':q')
  redis.call('SREM', KEYS[2] .. ':keys', ARGV[4])
  redis.call('HINCRBY', KEYS[2], 'bytes', string.format('%d', -found[2]))
  redis.call('HINCRBY', KEYS[2], 'keys', -1)
else
  redis.call('HSET', p .. ':m', 'appended', 0)
  redis.call('HINCRBY', p .. ':m', 'cleared', 1)
  if ARGV[3] == 'values' then redis.call('HSET', p .. ':m', 'version', ARGV[6]) end
end
redis.call('HINCRBY', KEYS[2], 'bytes', string.format('%d', -found[3]))
return 'ok'
"""

#: ARGV: the namespace's id, its name. KEYS[2] has the names. A key declared meanwhile must go first.
DROP = """
if (redis.call('HGET', KEYS[1], 'id') or '') ~= ARGV[1] then return 'gone' end
if redis.call('SCARD', KEYS[1] .. ':keys') > 0 then return 'more' end
redis.call('UNLINK', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
return 'ok'
"""

#: ARGV: id, mode, lease in ms. Returns a token, 0 if it is taken, -1 without the key.
LOCK = """
local p = KEYS[1]
if redis.call('HGET', p .. ':m', 'id') ~= ARGV[1] then return -1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', p .. ':r', '-inf', now)
if ARGV[2] == 'write' then
  if redis.call('EXISTS', p .. ':w') == 1 or redis.call('ZCARD', p .. ':r') > 0 then
    redis.call('SET', p .. ':q', 1, 'PX', 500)
    return 0
  end
  local token = redis.call('HINCRBY', p .. ':m', 'fence', 1)
  redis.call('SET', p .. ':w', token, 'PX', ARGV[3])
  redis.call('DEL', p .. ':q')
  return token
end
if redis.call('EXISTS', p .. ':w', p .. ':q') > 0 then return 0 end
local token = redis.call('HINCRBY', p .. ':m', 'fence', 1)
redis.call('ZADD', p .. ':r', now + ARGV[3], token)
return token
"""

#: ARGV: mode, token, lease in ms; 0 releases. Returns 1 if the lock was still held.
RENEW = """
local p = KEYS[1]
if ARGV[1] == 'write' then
  if redis.call('GET', p .. ':w') ~= ARGV[2] then return 0 end
  if ARGV[3] == '0' then redis.call('DEL', p .. ':w') else redis.call('PEXPIRE', p .. ':w', ARGV[3]) end
  return 1
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', p .. ':r', '-inf', now)
if not redis.call('ZSCORE', p .. ':r', ARGV[2]) then return 0 end
if ARGV[3] == '0' then
  redis.call('ZREM', p .. ':r', ARGV[2])
else
  redis.call('ZADD', p .. ':r', now + ARGV[3], ARGV[2])
end
return 1
"""

#: The merge mutex: ARGV token and lease in ms; 0 releases.
MUTEX = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""
