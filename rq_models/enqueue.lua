-- Enqueue jobs that differ in their id and input only, in one step: all of them are queued, or none.
--
-- KEYS  1 queue list, 2 rq:queues
-- ARGV  1 RQ's key prefix, 2 'RPUSH' or 'LPUSH', 3 seconds that a job may wait (0: for ever), 4 whether the ids were given
--       by the caller, 5 length of what follows: the hash fields and values that all jobs share; then an id and a data
--       field for each job
local prefix, push, ttl, shared = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
local fields = {}
for n = 1, shared do
  fields[n] = ARGV[5 + n]
end
redis.call('SADD', KEYS[2], KEYS[1])
for n = 6 + shared, #ARGV, 2 do
  local id = ARGV[n]
  local job = prefix .. ':job:' .. id
  if ARGV[4] == '1' then
    -- An id may be used again; the result of the earlier job is not this one's.
    redis.call('DEL', prefix .. ':results:' .. id)
  end
  redis.call('HSET', job, 'data', ARGV[n + 1], unpack(fields))
  if ttl > 0 then
    redis.call('EXPIRE', job, ttl)
  end
  redis.call(push, KEYS[1], id)
end
